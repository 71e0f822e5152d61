"""λ-GELU for Hugging Face transformers: from a pretrained GELU network to a ReLU network.

Importing registers the activation keys `lambda_gelu`, `lambda_gelu_tanh`, `lambda_quick_gelu` and `lambda_silu` in
transformers' activation tables, and does nothing else. The module that a name comes from is loaded when the name is first
used, so that the import brings no Trainer, data sets or plots.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .activation.registry import register

if TYPE_CHECKING:  # what type checkers, editors and the documentation see; _MODULES says the same to Python
    from .activation.functional import lambda_gelu, lambda_gelu_reference
    from .activation.hardness import sup_error, target_hardness
    from .activation.kernels.dispatch import KernelUnavailable, set_kernels
    from .activation.module import LambdaGELU, hardness_profile, hardness_sites
    from .checkpoints.card import CardDetails
    from .checkpoints.hub import push_relu_to_hub
    from .checkpoints.on_disk import CheckpointReport, convert_checkpoint, relu_ize_checkpoint
    from .checkpoints.remote_code import save_with_code
    from .checkpoints.save import save_relu_pretrained
    from .checkpoints.stock_process import VerificationError
    from .checkpoints.upload import PushError
    from .checkpoints.verify import verify_relu_pretrained
    from .downstream.onnx.export import export_onnx
    from .downstream.onnx.report import ExportError, ExportReport, Int8Report
    from .downstream.pruning import PruningReport, prune_dead_units
    from .downstream.sparse_ffn import SparseFFNReport, sparsify_ffn
    from .downstream.sparsity import ActivationSparsityReport, activation_sparsity
    from .downstream.verification.distance import DistanceReport, certified_distance
    from .downstream.verification.feed_forward import feed_forward
    from .downstream.verification.robustness import verify_robustness
    from .downstream.verification.verdicts import RobustnessReport
    from .measurement.audit.audit import AuditReport, audit
    from .measurement.batches import CalibrationError
    from .measurement.calibration import CalibrationReport, SiteStatistics, calibrate
    from .measurement.plots import plot_hardness, plot_sensitivity
    from .measurement.sensitivity import SensitivityReport, SiteSensitivity, sensitivity
    from .structure.loading import CheckpointError
    from .surgery.adapter_hardness import load_hardness
    from .surgery.conversion import ConversionError, ConversionReport, convert
    from .surgery.folding import FoldError, FoldReport, fold
    from .surgery.gates import SoftGateError, gates_as_relu
    from .surgery.hardening import harden
    from .surgery.hinges.plan import HingeError
    from .surgery.hinges.report import HingeReport
    from .surgery.llama import as_llama
    from .surgery.report import SubstitutionReport
    from .surgery.substitution import relu_ize
    from .training.arguments import LambdaGELUTrainingArguments
    from .training.distillation import DistillationTrainer
    from .training.hardness_callback import HardnessCallback
    from .training.optimizer import attach_hardness_update, parameter_groups
    from .training.schedule import HardeningSchedule
    from .training.trainer import LambdaGELUTrainer

__version__ = "0.2.0"

__all__ = [
    "ActivationSparsityReport",
    "AuditReport",
    "CalibrationError",
    "CalibrationReport",
    "CardDetails",
    "CheckpointError",
    "CheckpointReport",
    "ConversionError",
    "ConversionReport",
    "DistanceReport",
    "DistillationTrainer",
    "ExportError",
    "ExportReport",
    "FoldError",
    "FoldReport",
    "HardeningSchedule",
    "HardnessCallback",
    "HingeError",
    "HingeReport",
    "Int8Report",
    "KernelUnavailable",
    "LambdaGELU",
    "LambdaGELUTrainer",
    "LambdaGELUTrainingArguments",
    "PruningReport",
    "PushError",
    "RobustnessReport",
    "SensitivityReport",
    "SiteSensitivity",
    "SiteStatistics",
    "SoftGateError",
    "SparseFFNReport",
    "SubstitutionReport",
    "VerificationError",
    "activation_sparsity",
    "as_llama",
    "attach_hardness_update",
    "audit",
    "calibrate",
    "certified_distance",
    "convert",
    "convert_checkpoint",
    "export_onnx",
    "feed_forward",
    "fold",
    "gates_as_relu",
    "harden",
    "hardness_profile",
    "hardness_sites",
    "lambda_gelu",
    "lambda_gelu_reference",
    "load_hardness",
    "parameter_groups",
    "plot_hardness",
    "plot_sensitivity",
    "prune_dead_units",
    "push_relu_to_hub",
    "register",
    "relu_ize",
    "relu_ize_checkpoint",
    "save_relu_pretrained",
    "save_with_code",
    "sensitivity",
    "set_kernels",
    "sparsify_ffn",
    "sup_error",
    "target_hardness",
    "verify_relu_pretrained",
    "verify_robustness",
]

_MODULES = {
    "ActivationSparsityReport": ".downstream.sparsity",
    "AuditReport": ".measurement.audit.audit",
    "CalibrationError": ".measurement.batches",
    "CalibrationReport": ".measurement.calibration",
    "CardDetails": ".checkpoints.card",
    "CheckpointError": ".structure.loading",
    "CheckpointReport": ".checkpoints.on_disk",
    "ConversionError": ".surgery.conversion",
    "ConversionReport": ".surgery.conversion",
    "DistanceReport": ".downstream.verification.distance",
    "DistillationTrainer": ".training.distillation",
    "ExportError": ".downstream.onnx.report",
    "ExportReport": ".downstream.onnx.report",
    "FoldError": ".surgery.folding",
    "FoldReport": ".surgery.folding",
    "HardeningSchedule": ".training.schedule",
    "HardnessCallback": ".training.hardness_callback",
    "HingeError": ".surgery.hinges.plan",
    "HingeReport": ".surgery.hinges.report",
    "Int8Report": ".downstream.onnx.report",
    "KernelUnavailable": ".activation.kernels.dispatch",
    "LambdaGELU": ".activation.module",
    "LambdaGELUTrainer": ".training.trainer",
    "LambdaGELUTrainingArguments": ".training.arguments",
    "PruningReport": ".downstream.pruning",
    "PushError": ".checkpoints.upload",
    "RobustnessReport": ".downstream.verification.verdicts",
    "SensitivityReport": ".measurement.sensitivity",
    "SiteSensitivity": ".measurement.sensitivity",
    "SiteStatistics": ".measurement.calibration",
    "SoftGateError": ".surgery.gates",
    "SparseFFNReport": ".downstream.sparse_ffn",
    "SubstitutionReport": ".surgery.report",
    "VerificationError": ".checkpoints.stock_process",
    "activation_sparsity": ".downstream.sparsity",
    "as_llama": ".surgery.llama",
    "attach_hardness_update": ".training.optimizer",
    "audit": ".measurement.audit.audit",
    "calibrate": ".measurement.calibration",
    "certified_distance": ".downstream.verification.distance",
    "convert": ".surgery.conversion",
    "convert_checkpoint": ".checkpoints.on_disk",
    "export_onnx": ".downstream.onnx.export",
    "feed_forward": ".downstream.verification.feed_forward",
    "fold": ".surgery.folding",
    "gates_as_relu": ".surgery.gates",
    "harden": ".surgery.hardening",
    "hardness_profile": ".activation.module",
    "hardness_sites": ".activation.module",
    "lambda_gelu": ".activation.functional",
    "lambda_gelu_reference": ".activation.functional",
    "load_hardness": ".surgery.adapter_hardness",
    "parameter_groups": ".training.optimizer",
    "plot_hardness": ".measurement.plots",
    "plot_sensitivity": ".measurement.plots",
    "prune_dead_units": ".downstream.pruning",
    "push_relu_to_hub": ".checkpoints.hub",
    "relu_ize": ".surgery.substitution",
    "relu_ize_checkpoint": ".checkpoints.on_disk",
    "save_relu_pretrained": ".checkpoints.save",
    "save_with_code": ".checkpoints.remote_code",
    "sensitivity": ".measurement.sensitivity",
    "set_kernels": ".activation.kernels.dispatch",
    "sparsify_ffn": ".downstream.sparse_ffn",
    "sup_error": ".activation.hardness",
    "target_hardness": ".activation.hardness",
    "verify_relu_pretrained": ".checkpoints.verify",
    "verify_robustness": ".downstream.verification.robustness",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of the package's

    def __getattr__(name: str) -> object:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(module, __name__), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
