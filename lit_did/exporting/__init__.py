"""From a checkpoint, or a module after training, to a folder that `from_pretrained` opens, with a model card."""

from lit_did.exporting.checkpoints import consolidate_checkpoint
from lit_did.exporting.export import Exported, export_module, export_policy

__all__ = ["Exported", "consolidate_checkpoint", "export_module", "export_policy"]
