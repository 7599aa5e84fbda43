"""ViT and TNT for Keras 3: train on TensorFlow, JAX or torch, ship SavedModel and LiteRT."""

from . import explain as explain
from . import images as images
from .datasets import load_dataset as load_dataset
from .export import export as export
from .models import TNT as TNT
from .models import DeiT as DeiT
from .models import ViT as ViT
from .models import features as features
from .names import create_model as create_model
from .pretrained import decode_predictions as decode_predictions
from .pretrained import from_checkpoint as from_checkpoint
from .pretrained import inspect as inspect
from .pretrained import preprocessing as preprocessing
from .saving import save_weights as save_weights
from .tnt import PixelEmbedding as PixelEmbedding
from .tnt import TNTBlock as TNTBlock
from .tnt import WordsToPatch as WordsToPatch
from .variants import VARIANTS as VARIANTS
from .vit import MLP as MLP
from .vit import Attention as Attention
from .vit import AttentionPooling as AttentionPooling
from .vit import LayerScale as LayerScale
from .vit import PatchEncoder as PatchEncoder
from .vit import Patches as Patches
from .vit import TokenPooling as TokenPooling
from .vit import TransformerBlock as TransformerBlock
from .weights import load_weights as load_weights

__version__ = "0.1.0"
