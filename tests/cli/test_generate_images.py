"""`jaxherd generate --image`: images go before the text of the user's turn."""

import jax
import numpy as np
import pytest
from PIL import Image

import jaxherd
from jaxherd.cli.main import main
from jaxherd.data.images import ImageTokens, Tiling, image_tokens, tile_image
from jaxherd.data.tokenizers import train_bpe
from jaxherd.inference import generate
from jaxherd.models import presets
from jaxherd.models.multimodal_decoder import MultimodalDecoderConfig, text_part
from jaxherd.models.vision_tower import VisionTowerConfig

TEXTS = ["the king sees a dark sea and sings of old stone"]
MARKS = ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}<|header|>"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
)
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|header|>", "<|eot|>", *(f"<|{m}|>" for m in MARKS))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A multimodal Hugging Face folder with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = train_bpe(TEXTS, 280, special_tokens=SPECIAL, cache_dir=folder / "cache")
    tokenizer.chat_template = TEMPLATE
    config = MultimodalDecoderConfig.create(
        presets.llama4_text(
            vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=2, num_heads=2,
            num_kv_heads=1, head_dim=8, moe_layers=(), dense_dim=16, chunk_size=64,
            nope_interval=2, max_length=256,
        ),
        VisionTowerConfig(
            image_size=8, patch_size=2, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=32,
            output_dim=8, init_std=0.3,
        ),
        patch_token=ImageTokens.of(tokenizer).patch,
    )  # fmt: skip
    module = jax.jit(config.build)(jax.random.key(0))
    jaxherd.save(module, folder / "whole", format="hf", tokenizer=tokenizer)
    jaxherd.save(text_part(module), folder / "text", format="hf", tokenizer=tokenizer)
    other = train_bpe(TEXTS, 280, cache_dir=folder / "cache")
    jaxherd.save(module, folder / "blind", format="hf", tokenizer=other)
    for name, shape in (("small", (8, 8, 3)), ("wide", (8, 16, 3))):
        picture = np.random.RandomState(len(name)).randint(0, 256, shape, dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def requests(monkeypatch):
    """What the verb asks of the model."""
    seen, stream = [], generate.Generator.stream

    def spy(self, request, **options):
        seen.append((type(self.module).__name__, request))
        return stream(self, request, **options)

    monkeypatch.setattr(generate.Generator, "stream", spy)
    return seen


def colours(path):
    return np.asarray(Image.open(path))


def test_images_go_before_the_users_text(source, requests, capsys):
    arguments = ["generate", str(source / "whole"), "--prompt", " the king", "--system", "sea",
                 "--image", str(source / "small.png"), "--image", str(source / "wide.png"),
                 "--max-new-tokens", "2"]  # fmt: skip
    assert main(arguments) == 0
    (name, request), tokenizer = requests[0], jaxherd.load_tokenizer(source / "whole")
    marks, tiling = ImageTokens.of(tokenizer), Tiling(8)
    text = tokenizer.encode(
        "<|bos|><|header|>system<|header|>sea<|eot|><|header|>user<|header|>@ the king<|eot|>",
        parse_special=True,
    )
    at = text.index(tokenizer.encode("@")[0])
    images = [*image_tokens(1, 1, 4, marks), *image_tokens(1, 2, 4, marks)]
    assert list(request.tokens) == [*text[:at], *images, *text[at + 1 :]]
    wanted = [tile_image(colours(source / f"{n}.png"), tiling)[0] for n in ("small", "wide")]
    np.testing.assert_array_equal(request.images, np.concatenate(wanted))
    assert name == "MultimodalDecoder"


def test_without_a_template_they_come_first(source, requests, capsys):
    arguments = ["generate", str(source / "whole"), "--prompt", "the king", "--chat", "False",
                 "--image", str(source / "wide.png"), "--max-tiles", "1",
                 "--max-new-tokens", "2"]  # fmt: skip
    assert main(arguments) == 0
    tokenizer = jaxherd.load_tokenizer(source / "whole")
    image = image_tokens(1, 1, 4, ImageTokens.of(tokenizer))
    ids = [tokenizer.bos_id, *image, *tokenizer.encode("the king")]
    assert list(requests[0][1].tokens) == ids


def test_text_alone_does_not_read_the_tower(source, requests, capsys):
    assert (
        main(["generate", str(source / "whole"), "--prompt", "sea", "--max-new-tokens", "2"]) == 0
    )
    name, request = requests[0]
    assert name == "Decoder" and request.images is None


@pytest.mark.parametrize("text", ["a <|patch|>", "\ue0020\ue001", "\ue0000\ue001\ue0020\ue001"])
def test_what_looks_like_an_image_in_the_users_text_is_text(source, requests, capsys, text):
    arguments = ["generate", str(source / "whole"), "--prompt", text,
                 "--image", str(source / "small.png"), "--max-new-tokens", "2"]  # fmt: skip
    assert main(arguments) == 0
    patch = ImageTokens.of(jaxherd.load_tokenizer(source / "whole")).patch
    assert requests[0][1].tokens.count(patch) == 4


@pytest.mark.parametrize(
    "model, image, message",
    [
        ("text", "small.png", "is a model that reads no images: leave --image away"),
        ("blind", "small.png", "the tokenizer has no <|image_start|>"),
        ("whole", "absent.png", "There is no image file"),
        ("whole", "whole/config.json", "is none of PNG"),
    ],
)
def test_what_cannot_be_is_one_sentence(source, model, image, message, capsys, requests):
    arguments = ["generate", str(source / model), "--prompt", "x", "--image", str(source / image)]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("jaxherd: ") and err.count("\n") == 1
    assert not requests
