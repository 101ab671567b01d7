"""Known images are not decoded, all others as by plain vLLM: through vLLM's own frontend."""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import io
import itertools
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import vllm.multimodal.media.image as vllms_image
from PIL import Image
from tiny_architectures import ARCHITECTURES
from vllm.connections import global_http_connection
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, MediaConnector
from vllm.v1.engine.input_processor import InputProcessor

from tests.helpers.engine import IMAGE
from tests.helpers.files import BAD_IMAGES, GOOD_IMAGES, damaged_png, encoded, photo
from tests.helpers.proxy import Proxy, make_certificate
from vlcache_connector import media, metrics, register
from vlcache_connector.media import KnownImage, KnownImagesConnector, SeenImages

TRANSFER = {"kv_connector": "VLCacheConnector", "kv_role": "kv_both"}


class Frontend:
    """Loads images and puts them through vLLM's processor, as its servers do."""

    def __init__(self, model: Path, placeholder: str = IMAGE, **options: Any) -> None:
        register()
        self._placeholder = placeholder
        arguments: dict[str, Any] = {"kv_transfer_config": TRANSFER, **options}
        config = EngineArgs(
            model=str(model),
            max_model_len=4096,
            limit_mm_per_prompt={"image": 4},
            **arguments,
        ).create_engine_config()
        self.renderer: Any = InputProcessor(config).renderer

    def load(self, data: bytes, **media_io: Any) -> Any:
        connector = MEDIA_CONNECTOR_REGISTRY.load("http", media_io_kwargs={"image": media_io})
        return connector.fetch_image(data_url(data))

    def process(self, *images: Any, **more: Any) -> Any:
        text = " and ".join([self._placeholder] * len(images))
        prompt = {"prompt": text, "multi_modal_data": {"image": list(images)}, **more}
        [parsed] = self.renderer.render_prompts([prompt])
        [tokens] = self.renderer.tokenize_prompts([parsed], self.renderer.default_cmpl_tok_params)
        return self.renderer._process_tokens(tokens)

    def ask(self, data: bytes, **media_io: Any) -> Any:
        """A request with one image; what the engine would be given."""
        return self.process(self.load(data, **media_io))


class Decoded(list[bytes]):
    """What vLLM opened, in order."""

    def during(self, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.clear()
        return action(*arguments, **options)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    opened, original = Decoded(), vllms_image.open_image

    def open_image(file: io.BytesIO) -> Image.Image:
        opened.append(file.getvalue())
        return original(file)

    monkeypatch.setattr(vllms_image, "open_image", open_image)
    return opened


@pytest.fixture(scope="module")
def frontend(tiny_model: Callable[..., Path]) -> Frontend:
    return Frontend(tiny_model())


@pytest.fixture(autouse=True)
def nothing_seen(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "SEEN", SeenImages())
    frontend.renderer.clear_mm_cache()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def plain(data: bytes, **media_io: Any) -> Any:
    return ImageMediaIO(**media_io).load_bytes(data)


# -- known images -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_a_known_image_is_not_decoded_and_the_same_to_the_engine(
    frontend: Frontend, decoded: Decoded, name: str
) -> None:
    data = GOOD_IMAGES[name]()
    first = decoded.during(frontend.ask, data)
    assert decoded == [data]
    again = decoded.during(frontend.ask, data)
    assert decoded == []
    for part in ("prompt_token_ids", "mm_hashes", "mm_placeholders"):
        assert again[part] == first[part]
    # Of plain vLLM, too: by its hash its caches, and other servers', know the image.
    expected = frontend.process(plain(data))
    assert expected["mm_hashes"] == again["mm_hashes"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_processor_asks_for_pixels_of_what_is_in_its_cache(
    tiny_model: Callable[..., Path],
    image_placeholder: Callable[[str], str],
    decoded: Decoded,
    arch: str,
) -> None:
    frontend = Frontend(tiny_model(arch), image_placeholder(arch))
    data = encoded(photo(1), "PNG")
    first, again = frontend.ask(data), decoded.during(frontend.ask, data)
    assert decoded == []
    assert again["prompt_token_ids"] == first["prompt_token_ids"]
    assert again["mm_hashes"] == first["mm_hashes"]


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_pixels_of_a_known_image_are_those_of_plain_vllm(
    frontend: Frontend, decoded: Decoded, name: str
) -> None:
    data = GOOD_IMAGES[name]()
    frontend.ask(data)
    expected = plain(data).media
    image = decoded.during(frontend.load, data).media
    assert (image.size, image.mode, image.width) == (expected.size, "RGB", expected.width)
    assert decoded == []
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert decoded == [data]
    assert image.info.keys() == expected.info.keys()
    assert image.resize((7, 5)).tobytes() == expected.resize((7, 5)).tobytes()
    assert image.getexif() == expected.getexif()
    assert decoded == [data]


@pytest.mark.parametrize(
    "use",
    [
        lambda image: image.convert("L"),
        lambda image: image.copy(),
        lambda image: image.crop((3, 4, 20, 30)),
        lambda image: image.getpixel((3, 4)),
        lambda image: image.split()[1],
        lambda image: Image.blend(image, Image.new("RGB", image.size), 0.5),
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: Image.frombytes(image.mode, image.size, image.tobytes()),
    ],
)
def test_whatever_asks_for_pixels_gets_them(use: Callable[[Image.Image], Any]) -> None:
    known = KnownImage(photo(1).size, "RGB", functools.partial(photo, 1))
    assert use(known) == use(photo(1))


def test_what_no_image_has_does_not_decode() -> None:
    known = KnownImage((1, 1), "RGB", lambda: pytest.fail("decoded"))
    assert not hasattr(known, "colour")
    assert media.image_id(known) is None


def test_other_options_of_decoding_make_another_image(frontend: Frontend, decoded: Decoded) -> None:
    data = encoded(photo(1).convert("RGBA"), "PNG")
    white = frontend.ask(data)
    black = decoded.during(frontend.ask, data, rgba_background_color=[0, 0, 0])
    assert decoded == [data]
    assert black["mm_hashes"] != white["mm_hashes"]
    decoded.clear()
    assert frontend.ask(data, rgba_background_color=[0, 0, 0])["mm_hashes"] == black["mm_hashes"]
    assert frontend.ask(data)["mm_hashes"] == white["mm_hashes"]
    assert decoded == []
    decoded.during(frontend.load, data, image_mode=None)
    assert decoded == [data]


def test_other_options_of_the_processor_decode_late(frontend: Frontend, decoded: Decoded) -> None:
    data = encoded(photo(1), "PNG")
    frontend.ask(data)
    image = decoded.during(frontend.load, data)
    assert decoded == []
    small = frontend.process(image, mm_processor_kwargs={"max_pixels": 12544})
    assert decoded == [data]
    expected = frontend.process(plain(data), mm_processor_kwargs={"max_pixels": 12544})
    assert small["prompt_token_ids"] == expected["prompt_token_ids"]


def test_without_the_processors_output_an_image_is_decoded_on_arrival(
    frontend: Frontend, decoded: Decoded
) -> None:
    """In vLLM's threads for that, not in the only one that runs the processor."""
    data = encoded(photo(1), "PNG")
    frontend.ask(data)
    frontend.renderer.clear_mm_cache()
    decoded.during(frontend.load, data)
    assert decoded == [data]
    assert len(media.SEEN) == 0


def test_without_a_processor_cache_nothing_is_known(
    tiny_model: Callable[..., Path], decoded: Decoded
) -> None:
    frontend, data = Frontend(tiny_model(), mm_processor_cache_gb=0), encoded(photo(1), "PNG")
    for _ in range(2):
        decoded.during(frontend.ask, data)
        assert decoded == [data]
    assert len(media.SEEN) == 0


def test_known_only_as_long_as_the_cache_is_there(frontend: Frontend, decoded: Decoded) -> None:
    class Cache:
        def is_cached_item(self, mm_hash: str) -> bool:
            return True

    cache: Any = Cache()
    image = frontend.load(encoded(photo(1), "PNG"))
    media.remember(image, "hash", cache)
    assert media.SEEN.find(image.key) is not None
    del cache
    gc.collect()
    assert media.SEEN.find(image.key) is None


def test_a_name_makes_no_image_known(frontend: Frontend, decoded: Decoded) -> None:
    data = encoded(photo(1), "PNG")
    frontend.process(frontend.load(data), multi_modal_uuids={"image": ["holiday"]})
    decoded.during(frontend.load, data)
    assert decoded == [data]


def test_images_are_known_one_by_one(frontend: Frontend, decoded: Decoded) -> None:
    old, new = encoded(photo(1), "PNG"), encoded(photo(2), "JPEG")
    frontend.ask(old)
    both = decoded.during(lambda: frontend.process(frontend.load(new), frontend.load(old)))
    assert decoded == [new]
    plain_both = frontend.process(plain(new), plain(old))
    assert both["mm_hashes"] == plain_both["mm_hashes"]
    assert both["prompt_token_ids"] == plain_both["prompt_token_ids"]


# -- where images come from ---------------------------------------------------------------------


@pytest.fixture
def web(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Serves files, by URL; a file that was served is gone."""
    files: dict[str, bytes] = {}
    numbers = itertools.count()
    certificate, tls = make_certificate(tmp_path_factory.mktemp("tls"))
    trusted = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusted)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files.pop(self.path))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        encrypting = Proxy(server.server_address[1], tls)

        def add(data: bytes, scheme: str = "http") -> str:
            path = f"/{next(numbers)}.png"
            files[path] = data
            port = encrypting.port if scheme == "https" else server.server_address[1]
            return f"{scheme}://127.0.0.1:{port}{path}"

        yield add
        encrypting.close()
        server.shutdown()


@pytest.fixture(params=["blocking", "async"])
def fetch(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[MediaConnector, str], Any]]:
    """Loads an image by its URL."""
    if request.param == "blocking":
        yield lambda connector, url: connector.fetch_image(url)
        return
    monkeypatch.setattr(global_http_connection, "_async_client", None)  # another test's loop's
    with asyncio.Runner() as runner:
        yield lambda connector, url: runner.run(connector.fetch_image_async(url))


def test_known_by_bytes_however_they_come(
    frontend: Frontend,
    decoded: Decoded,
    web: Callable[..., str],
    tmp_path: Path,
    fetch: Callable[[MediaConnector, str], Any],
) -> None:
    data = encoded(photo(1), "PNG")
    (tmp_path / "image.png").write_bytes(data)
    connector = MEDIA_CONNECTOR_REGISTRY.load("http", allowed_local_media_path=str(tmp_path))
    frontend.ask(data)

    decoded.clear()
    in_file = (tmp_path / "image.png").as_uri()
    for url in (data_url(data), web(data), web(data, "https"), in_file):
        image = fetch(connector, url)
        assert isinstance(image.media, KnownImage)
        assert image.original_bytes == data
    assert decoded == []
    with pytest.raises(ValueError, match="must be a subpath"):
        fetch(connector, "file:///etc/hostname")


def test_known_out_of_vllms_cache_of_downloads(
    frontend: Frontend,
    decoded: Decoded,
    web: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fetch: Callable[[MediaConnector, str], Any],
) -> None:
    monkeypatch.setenv("VLLM_MEDIA_CACHE", str(tmp_path / "downloads"))
    data = encoded(photo(1), "PNG")
    url = web(data, "https")
    connector = MEDIA_CONNECTOR_REGISTRY.load("http")
    first = fetch(connector, url)
    assert not isinstance(first.media, KnownImage)
    frontend.ask(data)
    decoded.clear()
    again = fetch(connector, url)  # the server no longer has it
    assert isinstance(again.media, KnownImage)
    assert again.original_bytes == data
    assert decoded == []


# -- bad images ---------------------------------------------------------------------------------


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Kind and text of an error, without the addresses of objects."""
    try:
        action(*arguments, **options)
    except Exception as error:
        return re.sub(r"0x[0-9a-f]+", "0x", f"{type(error).__name__}: {error}")
    pytest.fail("it was taken")


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_as_by_plain_vllm(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    good, bad = encoded(photo(1), "PNG"), BAD_IMAGES[name]()
    frontend.ask(good)
    url = data_url(bad)
    expected = refusal(MediaConnector().fetch_image, url)
    for _ in range(2):
        assert refusal(frontend.load, bad) == expected
    assert len(media.SEEN) == 1
    # Even if two images had the same digest: the processor then asks for the pixels.
    monkeypatch.setattr(media.xxhash, "xxh3_128_digest", lambda *_: b"the same")
    frontend.ask(good)
    assert refusal(frontend.ask, bad)


def test_a_damaged_image_that_vllm_takes_is_decoded_each_time(
    frontend: Frontend, decoded: Decoded
) -> None:
    data = damaged_png()
    expected = frontend.process(plain(data))
    for _ in range(3):
        assert decoded.during(frontend.ask, data)["mm_hashes"] == expected["mm_hashes"]
        assert decoded == [data]


def test_an_image_of_too_many_pixels_is_refused_as_by_plain_vllm(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photo(1), "PNG")
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "100")
    expected = refusal(MediaConnector().fetch_image, data_url(data))
    assert "exceed the maximum of 100 pixels" in expected
    assert refusal(frontend.load, data) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"image_mode": "XYZ"},
        {"image_mode": ["RGB"]},
        {"image_mode": 7},
        {"rgba_background_color": [0, 0, 256]},
    ],
    ids=str,
)
def test_bad_options_of_decoding_are_refused_as_by_plain_vllm(
    frontend: Frontend, options: dict[str, Any]
) -> None:
    data = encoded(photo(1).convert("RGBA"), "PNG")
    frontend.ask(data)
    without = MediaConnector(media_io_kwargs={"image": options})
    expected = refusal(without.fetch_image, data_url(data))
    assert refusal(frontend.load, data, **options) == expected


# -- the record ---------------------------------------------------------------------------------


def test_the_record_is_bounded_and_forgets_what_was_used_longest_ago(
    frontend: Frontend, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MOST_IMAGES", 2)
    first, second, third = (encoded(photo(seed), "PNG") for seed in (1, 2, 3))
    for data in (first, second, first, third):
        frontend.ask(data)
    assert len(media.SEEN) == 2
    decoded.clear()
    for data in (first, third, second):
        frontend.load(data)
    assert decoded == [second]


def test_an_image_in_the_record_takes_less_than_a_kibibyte(frontend: Frontend) -> None:
    frontend.ask(encoded(photo(1).convert("RGBA"), "PNG"))
    [(key, seen)] = media.SEEN._seen.items()
    parts = (*key, *key[2], *seen.size, seen.mode, seen.item_hash, seen.cache)
    assert sum(map(sys.getsizeof, (key, seen, seen.size, *parts))) < 1024


def test_threads_share_the_record(frontend: Frontend) -> None:
    files = [encoded(photo(seed), "PNG") for seed in range(8)]
    expected = [frontend.ask(data)["mm_hashes"] for data in files]
    failed: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(20):
                for data in files:
                    frontend.load(data)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        frontend.renderer.clear_mm_cache()
        assert [frontend.ask(data)["mm_hashes"] for data in files] == expected
    for thread in threads:
        thread.join()
    assert failed == []


# -- switched on and off ------------------------------------------------------------------------


@pytest.fixture
def vllms_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before any engine with VLCache."""
    monkeypatch.setitem(MEDIA_CONNECTOR_REGISTRY.name2class, "http", MediaConnector)


def configure(model: Path, kv_connector: str = "VLCacheConnector", **extra: Any) -> type:
    transfer: Any = TRANSFER | {"kv_connector": kv_connector, "kv_connector_extra_config": extra}
    EngineArgs(
        model=str(model), max_model_len=1024, kv_transfer_config=transfer
    ).create_engine_config()
    return MEDIA_CONNECTOR_REGISTRY.name2class["http"]


@pytest.mark.usefixtures("vllms_connector")
def test_on_by_default(tiny_model: Callable[..., Path]) -> None:
    assert configure(tiny_model()) is KnownImagesConnector


@pytest.mark.usefixtures("vllms_connector")
@pytest.mark.parametrize(
    "extra",
    [{"lazy_decoding": False}, {"enabled": False}, {"kv_connector": "ExampleConnector"}],
    ids=str,
)
def test_off(tiny_model: Callable[..., Path], extra: dict[str, Any]) -> None:
    assert configure(tiny_model(), **extra) is MediaConnector


def test_a_connector_of_the_users_stays(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(MediaConnector):
        pass

    monkeypatch.setitem(MEDIA_CONNECTOR_REGISTRY.name2class, "http", Own)
    assert configure(tiny_model()) is Own


def test_other_media_are_left_alone() -> None:
    io = object()
    assert media._ours(io) is io  # type: ignore[arg-type]


# -- failures of our own, and figures -----------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What would be counted on `/metrics`."""
    counts: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        metrics, "count", lambda metric, *labels: counts.append((metric.name, *labels))
    )
    return counts


def test_what_becomes_of_images_is_counted(
    frontend: Frontend, counted: list[tuple[str, ...]]
) -> None:
    data = encoded(photo(1), "PNG")
    frontend.ask(data)
    frontend.ask(data)
    frontend.load(data).media.load()
    assert counted == [
        (metrics.IMAGES.name, decoding) for decoding in ("decoded", "known", "known", "late")
    ]


@pytest.mark.parametrize("broken", ["key", "find", "add"])
def test_a_failure_of_our_own_ends_in_a_decoded_image_and_a_counter(
    frontend: Frontend,
    decoded: Decoded,
    counted: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(SeenImages, broken, fail)
    data = encoded(photo(1), "PNG")
    for _ in range(2):
        result = decoded.during(frontend.ask, data)
        assert decoded == [data]
        assert result["mm_hashes"] == frontend.process(plain(data))["mm_hashes"]
    assert (metrics.FELL_BACK.name, "media") in counted
