"""Our ops in axolotl's trainings, where its configuration names the plugin:

    plugins:
      - llama_fast.engines.axolotl.LlamaFastPlugin

The model is patched as `llama_fast.patch` does it, adapters included.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from torch import nn

from ..hf import patch

LOG = get_logger(__name__)


class LlamaFastPlugin(BasePlugin):
    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Patches the model, and logs what serves which module. Raises PatchError for a model that
        `patch` does not know."""
        LOG.info("\n%s", patch(model).report)
