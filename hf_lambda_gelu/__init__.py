"""λ-GELU for Hugging Face transformers: from a pretrained GELU network to a ReLU network.

Importing registers the activation keys `lambda_gelu`, `lambda_gelu_tanh`, `lambda_quick_gelu` and `lambda_silu` in
transformers' activation tables, and does nothing else.
"""

from .activation.functional import lambda_gelu, lambda_gelu_reference
from .activation.hardness import sup_error, target_hardness
from .activation.kernels.dispatch import KernelUnavailable, set_kernels
from .activation.module import LambdaGELU, hardness_profile, hardness_sites
from .activation.registry import register
from .checkpoints.card import CardDetails
from .checkpoints.hub import PushError, push_relu_to_hub
from .checkpoints.on_disk import CheckpointReport, convert_checkpoint, relu_ize_checkpoint
from .checkpoints.remote_code import save_with_code
from .checkpoints.save import save_relu_pretrained
from .checkpoints.verify import VerificationError, verify_relu_pretrained
from .measurement.audit.audit import AuditReport, audit
from .measurement.batches import CalibrationError
from .measurement.calibration import CalibrationReport, SiteStatistics, calibrate
from .measurement.plots import plot_hardness, plot_sensitivity
from .measurement.sensitivity import SensitivityReport, SiteSensitivity, sensitivity
from .structure.loading import CheckpointError
from .surgery.conversion import ConversionError, ConversionReport, convert
from .surgery.folding import FoldError, FoldReport, fold
from .surgery.gates import SoftGateError, gates_as_relu
from .surgery.substitution import SubstitutionReport, relu_ize
from .training.arguments import LambdaGELUTrainingArguments
from .training.optimizer import attach_hardness_update
from .training.schedule import HardeningSchedule
from .training.trainer import LambdaGELUTrainer

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "CalibrationError",
    "CalibrationReport",
    "CardDetails",
    "CheckpointError",
    "CheckpointReport",
    "ConversionError",
    "ConversionReport",
    "FoldError",
    "FoldReport",
    "HardeningSchedule",
    "KernelUnavailable",
    "LambdaGELU",
    "LambdaGELUTrainer",
    "LambdaGELUTrainingArguments",
    "PushError",
    "SensitivityReport",
    "SiteSensitivity",
    "SiteStatistics",
    "SoftGateError",
    "SubstitutionReport",
    "VerificationError",
    "attach_hardness_update",
    "audit",
    "calibrate",
    "convert",
    "convert_checkpoint",
    "fold",
    "gates_as_relu",
    "hardness_profile",
    "hardness_sites",
    "lambda_gelu",
    "lambda_gelu_reference",
    "plot_hardness",
    "plot_sensitivity",
    "push_relu_to_hub",
    "register",
    "relu_ize",
    "relu_ize_checkpoint",
    "save_relu_pretrained",
    "save_with_code",
    "sensitivity",
    "set_kernels",
    "sup_error",
    "target_hardness",
    "verify_relu_pretrained",
]

register()
