"""Processors of images for tiny models, with a vocabulary of numbers and of all families' placeholders."""

from __future__ import annotations

from pathlib import Path

from tests.models.zoo import COMMON

SIDE = 112  # of an image where a family has one size, in pixels

# At the end of the vocabulary.
SPECIAL = (
    "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<image>",
    "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
    "<|end_of_video|>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|patch|>",
    "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|audio|>", "<boa>", "<eoa>", "\n", "\n\n", "\n\n\n", "\n\n\n\n",
)  # fmt: skip
FIRST_SPECIAL = COMMON["vocab_size"] - len(SPECIAL)
ID = {token: FIRST_SPECIAL + index for index, token in enumerate(SPECIAL)}


def save_processor(folder: Path, family: str) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(index): index for index in range(FIRST_SPECIAL)} | ID
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    special = {
        "Gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                   "image_token": "<image_soft_token>"},
        "Gemma4": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                   "image_token": "<|image|>", "audio_token": "<|audio|>", "boa_token": "<boa>",
                   "eoa_token": "<eoa>"},
        "InternVL": {"start_image_token": "<img>", "end_image_token": "</img>",
                     "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    }.get(family, {})  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="0",
        bos_token="1",
        eos_token="2",
        extra_special_tokens=special,
    )
    t = transformers
    pixels = {"height": SIDE, "width": SIDE}
    if family in ("Qwen2_5_VL", "Qwen3VL", "Qwen3_5", "Glm4v"):
        patch = 16 if family in ("Qwen3VL", "Qwen3_5") else 14
        limits = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
        image = t.Glm4vImageProcessor if family == "Glm4v" else t.Qwen2VLImageProcessor
        video = {
            "Glm4v": t.Glm4vVideoProcessor, "Qwen2_5_VL": t.Qwen2VLVideoProcessor,
        }.get(family, t.Qwen3VLVideoProcessor)  # fmt: skip
        kind = {"Qwen3_5": "Qwen3VL"}.get(family, family)
        processor = getattr(t, f"{kind}Processor")(
            image_processor=image(size=limits, patch_size=patch),
            tokenizer=fast,
            video_processor=video(size=limits, patch_size=patch),
        )
    elif family == "Mistral3":
        processor = t.PixtralProcessor(
            image_processor=t.PixtralImageProcessor(size={"longest_edge": SIDE}, patch_size=28),
            tokenizer=fast, patch_size=14, spatial_merge_size=2,
        )  # fmt: skip
    elif family == "Llava":
        processor = t.LlavaProcessor(
            image_processor=t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=pixels),
            tokenizer=fast, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
    elif family == "InternVL":
        processor = t.InternVLProcessor(
            image_processor=t.GotOcr2ImageProcessor(size=pixels, crop_to_patches=False),
            tokenizer=fast, video_processor=t.InternVLVideoProcessor(size=pixels),
            image_seq_length=16,
        )  # fmt: skip
    elif family == "Llama4":
        processor = t.Llama4Processor(
            image_processor=t.Llama4ImageProcessor(size=pixels), tokenizer=fast, patch_size=14
        )
    elif family == "Gemma3":
        processor = t.Gemma3Processor(
            t.Gemma3ImageProcessor(size=pixels), fast, image_seq_length=16
        )
    else:
        processor = t.Gemma4Processor(
            t.Gemma4AudioFeatureExtractor(), t.Gemma4ImageProcessor(patch_size=14), fast,
            t.Gemma4VideoProcessor(),
        )  # fmt: skip
    processor.save_pretrained(folder)
