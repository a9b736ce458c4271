"""Our ops in vLLM on a CPU, as a plugin that vLLM finds by its entry point.

    VLLM_PLUGINS=llama_fast vllm serve DIR

vLLM loads every installed plugin unless that variable names some. This one acts only where it is
named, so that to install this package changes no engine. It acts in each process of the engine.

    vllm_layers.py     RMSNorm, alone and with the residual sum, SwiGLU, rotation
    vllm_attention.py  attention of the steps that begin sequences

What the ops cannot serve stays vLLM's, as do the linear layers, the paged cache and, on a GPU,
everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from . import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig

logger = init_logger(f"vllm.plugins.{NAME}")


def register() -> None:
    """The entry point: gives vLLM our ops, once in a process."""
    if NAME not in (envs.VLLM_PLUGINS or ()):
        return logger.debug("llama_fast is not used: VLLM_PLUGINS does not name it")
    if not current_platform.is_cpu():
        return logger.warning("llama_fast is not used: its ops serve vLLM on CPUs alone")
    from . import vllm_attention, vllm_layers  # noqa: F401  they register themselves

    type(current_platform).get_default_ir_op_priority = classmethod(_ours_first)
    logger.info("llama_fast serves norms, SwiGLU, rotation and the attention of prompts")


def _ours_first(platform: type, config: VllmConfig) -> IrOpPriorityConfig:
    """Which providers vLLM asks first, where `--ir-op-priority` does not say. A plugin has no other
    place to say it."""
    from vllm.config.kernel import IrOpPriorityConfig

    ours = [NAME, "native"]
    return IrOpPriorityConfig.with_default(["native"], rms_norm=ours, fused_add_rms_norm=ours)
