"""GGUF files of a checkpoint: bfloat16, and what llama.cpp's own quantiser makes of that.

The tensors' names and keys are those that llama.cpp's converter gives to architecture "llama".
llama.cpp, ik_llama and OpenVINO read the same files.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from llama_fast.checkpoint import hf_to_meta_rows, open_checkpoint
from llama_fast.config import LlamaConfig
from llama_fast.nn.rope import inverse_frequencies

# Types of weights that `quantize` writes, by llama.cpp's names for its files.
FILE_TYPES = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K_M"}


def write_bf16(folder: Path, target: Path) -> None:
    """Writes a Hugging Face folder as a GGUF of bfloat16 weights, mapped rather than loaded."""
    config = open_checkpoint(folder).config
    writer = gguf.GGUFWriter(target, "llama")
    _add_keys(writer, config)
    if config.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", _frequency_factors(config).numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    for file in files:
        for name in file.keys():  # safe_open is no dictionary
            tensor = file.get_tensor(name)
            ours = names.get_name(name, try_suffixes=(".weight",))
            if tensor.ndim == 1:  # llama.cpp keeps norms in float32
                writer.add_tensor(ours, tensor.float().numpy())
                continue
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp rotates adjacent pairs, as Meta's weights are laid out.
                tensor = hf_to_meta_rows(tensor, len(tensor) // config.head_dim)
            writer.add_tensor(
                ours,
                tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy(),
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A vocabulary of the right size and no meaning: models are fed token ids, but OpenVINO opens
    no file without one, nor one without special tokens."""
    types = [gguf.TokenType.NORMAL] * vocab_size
    types[:2] = [gguf.TokenType.CONTROL] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"<{number}>" for number in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _frequency_factors(config: LlamaConfig) -> torch.Tensor:
    """What llama.cpp divides the unscaled frequencies by, (D/2,) float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    ours = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return (config.rope_theta**-exponent / ours.double()).float()


def quantize(source: Path, target: Path, kind: str, threads: int, *, pure: bool) -> None:
    """Has llama.cpp quantise a bfloat16 GGUF to `kind`, a key of FILE_TYPES.

    pure  every matrix in that type; otherwise llama.cpp's own mixture, in which some of the
          matrices, among them the head, are stored in more bits
    Raises RuntimeError when llama.cpp refuses.
    """
    import llama_cpp

    from .llama_cpp import silence

    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[kind]}")
    params.pure = pure
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind} (code {failed})")


def bytes_of_weights(path: Path) -> int:
    """Bytes of all tensors in a GGUF."""
    return int(sum(np.int64(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors))
