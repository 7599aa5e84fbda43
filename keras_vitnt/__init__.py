"""ViT and TNT for Keras 3: train on TensorFlow, JAX or torch, ship SavedModel and LiteRT."""

from . import explain as explain
from . import images as images
from .datasets import load_dataset as load_dataset
from .export import export as export
from .layers import MLP as MLP
from .layers import Attention as Attention
from .layers import AttentionPooling as AttentionPooling
from .layers import LayerScale as LayerScale
from .layers import PatchEncoder as PatchEncoder
from .layers import Patches as Patches
from .layers import PixelEmbedding as PixelEmbedding
from .layers import TNTBlock as TNTBlock
from .layers import TokenPooling as TokenPooling
from .layers import TransformerBlock as TransformerBlock
from .layers import WordsToPatch as WordsToPatch
from .models import TNT as TNT
from .models import VARIANTS as VARIANTS
from .models import DeiT as DeiT
from .models import ViT as ViT
from .models import create_model as create_model
from .models import features as features
from .weights import load_weights as load_weights

__version__ = "0.1.0"
