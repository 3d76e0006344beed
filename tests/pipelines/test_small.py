"""What `small_pipeline` promises: a tokenizer that knows every text, and layouts that follow labels and channels."""

import numpy as np
import pytest

from onereward.pipelines.small import small_pipeline, train_tokenizer


PROMPTS = ["Axial T1-weighted brain MRI with a ring-enhancing tumour", "FLAIR: oedema in the left hemisphere, 22 mm"]


def test_tokenizer_knows_every_byte_and_merges_what_it_was_trained_on():
    tokenizer = train_tokenizer(PROMPTS, vocab_size=600, max_length=32)
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) <= 600
    unknown = tokenizer.convert_tokens_to_ids(tokenizer.unk_token)
    for text in ("Ödem, µm² – 日本", "xyzzy 0123456789"):
        assert unknown not in tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokenizer("tumour", add_special_tokens=False).input_ids) == 1
    assert len(tokenizer("quokka", add_special_tokens=False).input_ids) > 1
    padded = tokenizer(PROMPTS[0], padding="max_length", max_length=32, truncation=True).input_ids
    assert len(padded) == 32 and padded[0] == tokenizer.bos_token_id and padded[-1] == tokenizer.eos_token_id


def test_tokenizer_decodes_what_it_encoded(tmp_path):
    tokenizer = train_tokenizer(PROMPTS)
    ids = tokenizer(PROMPTS[0]).input_ids
    assert (
        tokenizer.decode(ids, skip_special_tokens=True)
        == "axial t 1 - weighted brain mri with a ring - enhancing tumour"
    )
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(PROMPTS[0]).input_ids == ids


@pytest.mark.parametrize("labels", [None, {"background": 0, "lesion": 1}])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_layout_follows_labels_and_channels(labels, image_channels):
    sizes = {"vae_channels": (8, 8), "unet_channels": (16, 16), "text_channels": 16}
    pipeline = small_pipeline(PROMPTS, labels, image_channels=image_channels, image_size=32, **sizes)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.in_channels == 9 + len(labels or {})
    assert pipeline.has_label_channels == (labels is not None)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, image_channels), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    result = pipeline("a lesion", image, mask, num_inference_steps=1, output_type="np").images[0]
    assert result.shape == image.shape and np.array_equal(result[mask == 0], image[mask == 0])


def test_embedded_base_stays_small():
    pipeline = small_pipeline(PROMPTS, {"background": 0, "NCR": 1, "ED": 2, "ET": 3})
    modules = (pipeline.vae, pipeline.unet, pipeline.text_encoder)
    assert sum(p.numel() for module in modules for p in module.parameters()) * 4 < 20e6
