"""A vision-language model package: any ViT, any Hugging Face language model, linked by gated cross-attention adapters.

    import vlm
    model = vlm.load("runs/demo/model")
    model.caption("picture.jpg")

After `import vlm`, transformers' Auto classes and `pipeline("image-text-to-text")` find saved models.
"""

from vlm.garbage import uncollected

with uncollected():
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    from vlm.api import VLM, load
    from vlm.configuration import VLMConfig
    from vlm.errors import RunError, UsageError
    from vlm.model import VLMModel
    from vlm.processing import VLMImageProcessor, VLMProcessor
    from vlm.together import load_together

AutoConfig.register("vlm", VLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, VLMModel, exist_ok=True)
AutoImageProcessor.register(VLMConfig, image_processor_classes={"pil": VLMImageProcessor}, exist_ok=True)
AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)

__all__ = [
    "VLM",
    "RunError",
    "UsageError",
    "VLMConfig",
    "VLMImageProcessor",
    "VLMModel",
    "VLMProcessor",
    "load",
    "load_together",
]
