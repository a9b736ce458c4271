"""EleutherAI's lm-evaluation-harness over this package's models: folders of any format, quantised
ones and LoRAs too, scored by its tasks.

    python -m llama_fast.engines.lm_eval run --model llama_fast \\
        --model_args pretrained=DIR,quantize=int4 --tasks hellaswag --batch_size 16

Texts are encoded as the harness has transformers do it, so that scores compare: begin_of_text
comes first, and special tokens that a text spells are special.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..errors import LlamaFastError
from ..generation.generate import generate
from ..model import Llama
from ..tokenizer import Tokenizer
from ..tokenizer.chat_choice import chat_format

Request = TypeVar("Request")
# A context and what is to be scored behind it, as texts and as ids.
Pair = tuple[Any, list[int], list[int]]
NEW_TOKENS = 256  # of an answer, where a task does not say


@register_model("llama_fast")
class LlamaFast(TemplateLM):
    """The model "llama_fast" of the harness.

    pretrained   the folder; dtype, quantize, device and max_seq_len as `Llama.from_pretrained`
    adapter      the folder of a LoRA
    kv_cache     as in `generate`, for tasks that generate
    batch_size   texts at a time
    """

    def __init__(
        self,
        pretrained: str,
        *,
        adapter: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        device: str | None = None,
        max_seq_len: int | None = None,
        kv_cache: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,  # of "auto", which there is not
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise LlamaFastError(f"batch_size is {batch_size!r}; give a number of texts")
        self.folder, self.batch_size, self.kv_cache = Path(pretrained), int(batch_size), kv_cache
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness asks for "cuda:0" where nobody has said anything
        self.model = Llama.from_pretrained(
            self.folder,
            device=device or "auto",
            dtype=None if dtype in (None, "auto") else getattr(torch, dtype, dtype),
            quantize=quantize,
            max_seq_len=max_seq_len,
        ).eval()
        if adapter is not None:
            from ..training import load_adapter

            load_adapter(self.model, adapter)
        self.words = Tokenizer.from_pretrained(self.folder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id if self.words.eos_id is not None else min(self.words.stop_ids)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder.resolve())

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return chat_format(self.folder, self.words).fingerprint() if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        format = chat_format(self.folder, self.words)
        asked = {"add_generation_prompt": add_generation_prompt}
        return self.words.decode(format.encode(chat_history, **asked).ids)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self.words.encode(string, allowed_special="all")
        begins = self.words.bos_id is not None and add_special_tokens is not False
        return [self.words.bos_id, *ids] if begins and ids[:1] != [self.words.bos_id] else ids

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(scored) for _, _, scored in requests), default=0)
        if longest > self.max_length:
            raise LlamaFastError(
                f"a continuation of {longest} tokens is to be scored, and the context is "
                f"{self.max_length}: give a larger max_seq_len, or take another task"
            )
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(
            requests, lambda pair: len(pair[1]) + len(pair[2]), disable_tqdm
        ):
            texts = [(a + b)[-self.max_length - 1 :] for _, a, b in batch.values()]
            shape = len(texts), max(map(len, texts)) - 1
            tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
            for row, text in zip(tokens, texts, strict=True):  # nothing sees the padding behind it
                row[: len(text) - 1] = torch.tensor(text[:-1], device="cpu")
            hidden = self.model.hidden(tokens.to(self.device))
            for row, (index, (key, _, scored)), text in zip(
                hidden, batch.items(), texts, strict=True
            ):
                # Logits of what is scored alone: those of whole texts would not fit.
                end = len(text) - 1
                logits = self.model.head(row[end - len(scored) : end]).float()
                logits = logits[:, : self.words.vocab_size]
                wanted = torch.tensor(scored, device=logits.device)
                score = logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum().item()
                found[index] = score, bool((logits.argmax(-1) == wanted).all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        pairs: list[Pair] = []
        of_text = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            before = len(pairs)
            pairs += ((None, *make_disjoint_window(window)) for window in windows)
            of_text.append(slice(before, len(pairs)))
        scores = [score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm)]
        found = [sum(scores[part]) for part in of_text]
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        alike: dict[str, dict[int, Instance]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), {})[index] = request
        for group in alike.values():
            settings = self._settings(next(iter(group.values())).args[1])
            room = self.max_length - settings["max_new_tokens"]
            if room < 1:
                raise LlamaFastError(
                    f"answers of {settings['max_new_tokens']} tokens were asked for, and the "
                    f"context is {self.max_length}: give a smaller max_gen_toks"
                )
            indices = list(group)
            prompts = [self.tok_encode(request.args[0])[-room:] for request in group.values()]
            for batch in self._batches(prompts, len, disable_tqdm):
                made = generate(self.model, self.words, list(batch.values()), **settings)
                for at, completion in zip(batch, made, strict=True):
                    index = indices[at]
                    found[index] = completion.text
                    args = requests[index].args
                    self.cache_hook.add_partial("generate_until", args, completion.text)
        return [found[index] for index in range(len(requests))]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` that a task's generation_kwargs say."""
        given = dict(given)
        until = given.pop("until", None) or []
        drawn = {name: given.pop(name) for name in ("top_p", "top_k") if name in given}
        temperature = given.pop("temperature", 1.0 if given.get("do_sample") else 0.0)
        sampled = given.pop("do_sample", temperature > 0)
        tokens = given.pop("max_gen_toks", None) or given.pop("max_new_tokens", None) or NEW_TOKENS
        if given:
            raise LlamaFastError(
                f"a task asks for {', '.join(given)}, which generation has not: leave it out with "
                "--gen_kwargs, or take another task"
            )
        return {
            "max_new_tokens": tokens,
            "temperature": temperature if sampled else 0.0,
            "stop": [until] if isinstance(until, str) else until,
            "kv_cache": self.kv_cache,
            "seed": 0,
            **drawn,
        }

    def _batches(
        self, requests: Sequence[Request], length: Any, quiet: bool
    ) -> Iterator[dict[int, Request]]:
        """Requests of about one length together, the longest first, by their index."""
        order = sorted(range(len(requests)), key=lambda index: -length(requests[index]))
        for start in tqdm(range(0, len(order), self.batch_size), disable=quiet):
            yield {index: requests[index] for index in order[start : start + self.batch_size]}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
