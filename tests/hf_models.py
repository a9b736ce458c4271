"""Small random transformers models for the tests of llama_fast.hf, in either supported version."""

from __future__ import annotations

import torch
import transformers

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def config(family: str = "Llama", **more) -> transformers.PretrainedConfig:
    return getattr(transformers, f"{family}Config")(
        **{
            "hidden_size": 64,
            "intermediate_size": 144,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 257,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | more
    )


def model(family: str = "Llama", kind: str = "ForCausalLM", **more) -> torch.nn.Module:
    """In evaluation mode, with weights large enough that its logits are not all alike."""
    torch.manual_seed(0)
    made = getattr(transformers, family + kind)(config(family, **more)).eval()
    for name, parameter in made.named_parameters():  # norms of ones would hide a wrong weight
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.08)
    return made


def tokens(*shape: int) -> torch.Tensor:
    shape = shape or (2, 21)
    return torch.randint(1, 257, shape, generator=torch.Generator().manual_seed(1))


def left_padded(ids: torch.Tensor, count: int = 6) -> dict[str, torch.Tensor]:
    """The same ids with the first row padded on the left, and their mask."""
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
