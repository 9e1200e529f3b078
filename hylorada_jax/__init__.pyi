from .config import HyLoRADAConfig as HyLoRADAConfig
from .errors import HyLoRADAError as HyLoRADAError
from .model import HyLoRADAModel as HyLoRADAModel
from .modules.linear import DoRALinear as DoRALinear
from .modules.linear import HyLoRADALinear as HyLoRADALinear
from .modules.linear import LoRALinear as LoRALinear
