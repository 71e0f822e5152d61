"""λ-GELU for Hugging Face transformers: from a pretrained GELU network to a ReLU network.

Importing registers the activation keys `lambda_gelu`, `lambda_gelu_tanh`, `lambda_quick_gelu` and `lambda_silu` in
transformers' activation tables, and does nothing else.
"""

from .activation import LambdaGELU, hardness_profile, hardness_sites
from .arguments import LambdaGELUTrainingArguments
from .audit import AuditReport, audit
from .batches import CalibrationError
from .calibration import CalibrationReport, SiteStatistics, calibrate
from .card import CardDetails
from .checkpoints import CheckpointReport, convert_checkpoint, relu_ize_checkpoint
from .conversion import ConversionError, ConversionReport, convert
from .export import VerificationError, save_relu_pretrained, verify_relu_pretrained
from .fold import FoldError, FoldReport, fold
from .functional import lambda_gelu, lambda_gelu_reference
from .hardening import HardeningSchedule, sup_error, target_hardness
from .hub import PushError, push_relu_to_hub
from .kernels import KernelUnavailable, set_kernels
from .optim import attach_hardness_update
from .plots import plot_hardness, plot_sensitivity
from .registry import register
from .remote import save_with_code
from .safetensors_files import CheckpointError
from .sensitivity import SensitivityReport, SiteSensitivity, sensitivity
from .substitution import SoftGateError, SubstitutionReport, gates_as_relu, relu_ize
from .training import LambdaGELUTrainer

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
