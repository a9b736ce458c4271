"""The situations of transformers' own tests of Llama and of generate(): a patched model beside the
unpatched one, with either attention of its own.

Tokens must be equal and numbers within rounding; of what is asked for, nothing may be missing.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llama_fast
from llama_fast.hf.patched import is_patched
from tests.hf_models import left_padded, model, tokens

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="needs transformers 5: names differ before"
)
NEW = 6  # tokens, unless the situation says otherwise


def patched(net) -> bool:
    return any(map(is_patched, net.modules()))


def flat(found: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of nested results, by where they stand; caches are left out."""
    if isinstance(found, Tensor):
        return {name: found}
    if isinstance(found, dict):
        return {k: v for key, x in found.items() for k, v in flat(x, f"{name}.{key}").items()}
    if isinstance(found, list | tuple):
        return {k: v for i, x in enumerate(found) for k, v in flat(x, f"{name}.{i}").items()}
    return {}


def compare(own: Any, given: Any) -> None:
    own, given = flat(own), flat(given)
    assert own and own.keys() == given.keys()
    for name, x in own.items():
        assert x.dtype is given[name].dtype and x.shape == given[name].shape, name
        if x.is_floating_point():  # scores of tokens that are not to be drawn are -inf
            size = x[x.isfinite()].abs().max().item()
            torch.testing.assert_close(given[name], x, rtol=0, atol=1e-5 * size, msg=name)
        else:
            assert torch.equal(given[name], x), name


def generate(net, **settings) -> Any:
    """Of two prompts, one of them padded."""
    torch.manual_seed(7)
    asked = {"max_new_tokens": NEW, "do_sample": False} | left_padded(tokens(2, 9), 4) | settings
    return net.generate(**asked)


# Without hidden states where a row is padded: eager attention, the op and SDPA each have something
# else where a token sees nothing.
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


def attentions(net, **settings) -> Any:
    if net.config._attn_implementation != "eager":
        settings["output_attentions"] = False  # SDPA has none, patched or not
    return generate(net, **EVERYTHING, **{"output_attentions": True} | settings)


def assistant(net) -> Any:
    """Smaller, of other weights, and patched where the model is."""
    return generate(net, **without_padding(), assistant_model=smaller(net))


def smaller(net) -> Any:
    made = model(num_hidden_layers=1)
    made.generation_config.num_assistant_tokens = 3
    if patched(net):
        llama_fast.patch(made)
    return made


def without_padding(rows: int = 1) -> dict[str, Any]:
    ids = tokens(rows, 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def static_cache(net, **settings) -> Any:
    cache = transformers.StaticCache(config=net.config, max_cache_len=24)
    return generate(net, past_key_values=cache, disable_compile=True, **settings)


def continued(net) -> Any:
    """From the cache of an earlier generation."""
    first = generate(net, **without_padding(), return_dict_in_generate=True)
    ids = torch.cat((first.sequences, tokens(1, 3)), 1)
    mask = torch.ones_like(ids)
    cache = first.past_key_values
    return generate(net, input_ids=ids, attention_mask=mask, past_key_values=cache)


def embeddings(net, **settings) -> Any:
    padded = left_padded(tokens(2, 9), 4)
    embeds = net.get_input_embeddings()(padded["input_ids"])
    return generate(net, inputs_embeds=embeds, **settings)


def embeddings_alone(net) -> Any:
    embeds = net.get_input_embeddings()(tokens(1, 9)).detach()
    mask = torch.ones(1, 9, dtype=torch.int64)
    asked = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": NEW}
    return net.generate(**asked, do_sample=False)


def padding_changes_nothing(net) -> Any:
    """Logits of the last token, with padding on the left and without."""
    ids = tokens(1, 9)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with_padding = net(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    alone = net(ids).logits[:, -1]
    torch.testing.assert_close(with_padding, alone, rtol=1e-3, atol=1e-4)
    return with_padding


def mask_of_four_dims(net) -> Any:
    """Three continuations of one beginning in one row, told apart by a mask of their own."""
    beginning, ends = tokens(1, 6), torch.tensor([[11], [12], [13]])
    row = torch.cat((beginning, ends.t()), 1)
    positions = torch.tensor([[*range(6), 6, 6, 6]])
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[6:, 6:] = torch.eye(3, dtype=torch.bool)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    packed = net(row, attention_mask=mask, position_ids=positions).logits[0, 6:]
    apart = net(torch.cat((beginning.expand(3, -1), ends), 1)).logits[:, -1]
    torch.testing.assert_close(packed, apart, rtol=1e-3, atol=1e-4)
    return packed


def last_logits(net) -> Any:
    inputs = left_padded(tokens())
    whole = net(**inputs).logits
    some = net(**inputs, logits_to_keep=3).logits
    torch.testing.assert_close(some, whole[:, -3:])
    chosen = net(**inputs, logits_to_keep=torch.tensor([20, 14])).logits
    torch.testing.assert_close(chosen, whole[:, [20, 14]])
    return some, chosen


def tuples(net) -> Any:
    asked = {"output_hidden_states": True, "use_cache": False}
    ids = tokens()
    as_tuple = net(ids, **asked, return_dict=False)
    compare(tuple(net(ids, **asked).to_tuple()), as_tuple)
    return as_tuple


def kept_gradients(net) -> Any:
    """Of hidden states, and of attentions where there are some."""
    eager = net.config._attn_implementation == "eager"
    out = net(tokens(), output_hidden_states=True, output_attentions=eager)
    kept = [*out.hidden_states[:-1], *(out.attentions or ())]
    for x in kept:
        x.retain_grad()
    (out.logits.logsumexp(-1).sum() + out.hidden_states[-1].sum()).backward()
    return [x.grad for x in kept]


def gradients(net, **settings) -> Any:
    net.train()
    ids = tokens()
    out = net(ids, labels=ids, **settings)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in net.named_parameters()}


def checkpointing(reentrant: bool) -> Callable:
    def run(net) -> Any:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            net.enable_input_require_grads()
        counted, layer = [], net.model.layers[0]
        layer.self_attn.register_forward_hook(lambda *_: counted.append(1))
        found = gradients(net, use_cache=False)
        assert len(counted) == 2, "the layer was not computed again"
        return found

    return run


def resized(net) -> Any:
    """Longer, then shorter than it was, tied or not."""
    found = []
    for rows in (300, 200):
        torch.manual_seed(3)
        net.resize_token_embeddings(rows, mean_resizing=False)
        ids = tokens() % 200
        logits = net(ids).logits
        assert logits.shape[-1] == rows == net.config.vocab_size
        found += [logits, generate(net, input_ids=ids, attention_mask=torch.ones_like(ids))]
    return found


def tied(net) -> Any:
    net.config.tie_word_embeddings = True
    net.tie_weights()
    net.lm_head.weight = net.model.embed_tokens.weight
    return gradients(net)


def other_attention(net) -> Any:
    found = []
    for name in ("eager", "sdpa", "eager"):
        net.set_attn_implementation(name)
        found.append(net(**left_padded(tokens())).logits[:, 6:])
    return found


def compiled(net) -> Any:
    """The patched one: prefill and steps against a static cache, in whole graphs."""
    forward = net.forward
    if patched(net):
        torch._dynamo.reset()
        forward = torch.compile(forward, backend="eager", fullgraph=True)
    cache = transformers.StaticCache(config=net.config, max_cache_len=24)
    found = []
    with torch.no_grad():
        for ids, at in ((tokens(2, 9), range(9)), (tokens(2, 1), [9]), (tokens(2, 1), [10])):
            positions = torch.tensor([*at])[None]
            out = forward(input_ids=ids, position_ids=positions, past_key_values=cache)
            found.append(out.logits.clone())
    return found


def exported(net) -> Any:
    """The patched one."""
    inputs = {"input_ids": tokens(), "use_cache": False}
    with torch.no_grad():
        run = torch.export.export(net, (), inputs).module() if patched(net) else net
        return run(**inputs).logits


def half(net) -> Any:
    """bfloat16 rounds otherwise, so only what is certain: finite, and of the right shape."""
    net.to(torch.bfloat16)
    found = generate(net, **EVERYTHING)
    assert all(x.isfinite().all() for x in flat(found.logits).values())
    return torch.tensor(found.sequences.shape)


class Keeps(transformers.generation.streamers.BaseStreamer):
    """What generate() streams."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.found.append(value)

    def end(self) -> None:
        self.found.append(torch.tensor([-1]))


def streamed(net) -> Any:
    keeps = Keeps()
    generate(net, **without_padding(), streamer=keeps)
    return keeps.found


def autocast(net) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(tokens()).logits
    assert logits.isfinite().all()
    return torch.tensor(logits.shape)


SITUATIONS: dict[str, Callable[[Any], Any]] = {
    "greedy": generate,
    "greedy, everything": attentions,
    "greedy, without a cache": lambda net: attentions(net, use_cache=False),
    "sampling": lambda net: generate(
        net, **without_padding(2), do_sample=True, top_k=20, num_return_sequences=2, **EVERYTHING
    ),
    "beams": lambda net: attentions(net, num_beams=3, num_return_sequences=3),
    "beams, without a cache": lambda net: generate(net, num_beams=3, use_cache=False),
    "beams, sampled": lambda net: generate(net, num_beams=2, do_sample=True, top_k=9),
    "an assistant": assistant,
    "an assistant, sampled": lambda net: generate(
        net, **without_padding(), assistant_model=smaller(net), do_sample=True, top_k=9
    ),
    "prompt lookup": lambda net: generate(
        net, **without_padding(), prompt_lookup_num_tokens=3, max_matching_ngram_size=1
    ),
    "its own first layer as assistant": lambda net: generate(
        net, **without_padding(), assistant_early_exit=1
    ),
    "static cache": static_cache,
    "static cache, everything": lambda net: static_cache(net, **without_padding(2), **EVERYTHING),
    "static cache, beams": lambda net: generate(
        net, cache_implementation="static", num_beams=2, disable_compile=True
    ),
    "static cache by its name": lambda net: generate(
        net, cache_implementation="static", disable_compile=True
    ),
    "prefill in chunks": lambda net: generate(net, prefill_chunk_size=4),
    "continued from a cache": continued,
    "embeddings beside ids": embeddings,
    "embeddings alone": embeddings_alone,
    "embeddings, static cache": lambda net: embeddings(
        net, cache_implementation="static", disable_compile=True
    ),
    "guidance": lambda net: generate(
        net, guidance_scale=1.6, negative_prompt_ids=tokens(2, 9)[:, :4]
    ),
    "penalties": lambda net: generate(
        net, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3
    ),
    "a streamer": streamed,
    "padding": padding_changes_nothing,
    "a mask of four dims": mask_of_four_dims,
    "the last logits": last_logits,
    "tuples": tuples,
    "kept gradients": kept_gradients,
    "training": gradients,
    "checkpointing": checkpointing(False),
    "checkpointing, reentrant": checkpointing(True),
    "resized": resized,
    "tied": tied,
    "another attention": other_attention,
    "bfloat16": half,
    "autocast": autocast,
}


WHOLE_GRAPHS = {"compiled": compiled, "exported": exported}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize(
    ("situation", "attention"),
    [
        *itertools.product(SITUATIONS, ("sdpa", "eager")),
        *((situation, "sdpa") for situation in WHOLE_GRAPHS),
    ],
)
def test_as_unpatched(situation, attention):
    run = (SITUATIONS | WHOLE_GRAPHS)[situation]
    net = model(attn_implementation=attention)
    twin = copy.deepcopy(net)
    with llama_fast.patch(twin) as patch:
        compare(run(net), run(twin))
        assert patch.active


ROPES = {
    "linear": {"rope_type": "linear", "factor": 10.0},
    "dynamic": {"rope_type": "dynamic", "factor": 10.0},
    "yarn": {"rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8,
        "factor": 2.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions(kind):
    """A short text, one that is longer than the model was made for, and a short one again."""
    scaling = ROPES[kind] | {"rope_theta": 10000.0}
    net = model(max_position_embeddings=32, rope_parameters=scaling)
    with torch.no_grad():
        own = [net(tokens(1, n)).logits for n in (10, 48, 10)]
        with llama_fast.patch(net):
            compare(own, [net(tokens(1, n)).logits for n in (10, 48, 10)])
