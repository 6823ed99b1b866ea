"""The rows of the table of generative vision-language models: what each is and where its weights come from."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from medrobust_lib.data.wording import suggest

DEMO_VLM = "demo-vlm"
FOLDER_PREFIX = "local-dir:"
HUB_PREFIX = "hf:"
_DEFAULT_SIZE = 336  # of models that the table does not know: the size of LLaVA's image tower

# Without `do_resize` an image would be enlarged to four times the side of the tile that it is then shrunk to.
_ONE_TILE = (("do_image_splitting", False), ("do_resize", False))


@dataclass(frozen=True)
class VlmEntry:
    """One row of the table of generative models.

    Attributes
    ----------
    id : str
        Name for `load_vlm`.
    family : str
        Architecture in a few words.
    image_size : int
        S: noise is added to [0, 1] pixels of S x S, before the model's own processor resizes or tiles them.
    parameters : int or None
        Number of parameters; None if not known.
    licence : str
        Licence of the weights.
    source : str
        ``hf:OWNER/NAME`` on the hub, ``local-dir:PATH``, or a sentence for what ships with the package.
    citation : str
        Paper to cite.
    image_options : tuple of (str, object)
        Names and values of the image processor's settings that differ from the model's own.
    """

    id: str
    family: str
    image_size: int
    parameters: int | None
    licence: str
    source: str
    citation: str
    image_options: tuple[tuple[str, object], ...] = ()


BUILT_IN: tuple[VlmEntry, ...] = (
    VlmEntry(
        id=DEMO_VLM,
        family="tiny LLaVA trained on phantoms of histology, blood, chest and oct",
        image_size=64,
        parameters=1_601_280,
        licence="MIT",
        source="shipped with medrobust_lib (models/demo/vlm)",
        citation="this package",
    ),
    VlmEntry(
        id="llava-1.6-mistral-7b",
        family="LLaVA-1.6 (LLaVA-NeXT) on Mistral-7B",
        image_size=336,
        parameters=7_566_747_648,
        licence="Apache-2.0",
        source="hf:llava-hf/llava-v1.6-mistral-7b-hf",
        citation="Liu et al. 2024, arXiv:2310.03744",
    ),
    VlmEntry(
        id="llava-1.6-vicuna-7b",
        family="LLaVA-1.6 (LLaVA-NeXT) on Vicuna-7B",
        image_size=336,
        parameters=7_063_431_168,
        licence="Llama 2 Community License",
        source="hf:llava-hf/llava-v1.6-vicuna-7b-hf",
        citation="Liu et al. 2024, arXiv:2310.03744",
    ),
    VlmEntry(
        id="smolvlm-256m",
        family="SmolVLM 256M, images in one tile",
        image_size=512,
        parameters=256_484_928,
        licence="Apache-2.0",
        source="hf:HuggingFaceTB/SmolVLM-256M-Instruct",
        citation="Marafioti et al. 2025, arXiv:2504.05299",
        image_options=_ONE_TILE,
    ),
    VlmEntry(
        id="smolvlm-500m",
        family="SmolVLM 500M, images in one tile",
        image_size=512,
        parameters=507_482_304,
        licence="Apache-2.0",
        source="hf:HuggingFaceTB/SmolVLM-500M-Instruct",
        citation="Marafioti et al. 2025, arXiv:2504.05299",
        image_options=_ONE_TILE,
    ),
    VlmEntry(
        id="qwen2-vl-2b",
        family="Qwen2-VL 2B",
        image_size=448,
        parameters=2_208_985_600,
        licence="Apache-2.0",
        source="hf:Qwen/Qwen2-VL-2B-Instruct",
        citation="Wang et al. 2024, arXiv:2409.12191",
    ),
)


def find_vlm(id: str, *, dual_encoders: Collection[str] = ()) -> VlmEntry:
    """Row of a generative model; ``local-dir:PATH`` and ``hf:OWNER/NAME`` make one.

    Parameters
    ----------
    id : str
    dual_encoders : collection of str
        Ids of models that do not generate, to say of one of them how it is loaded.

    Raises
    ------
    ValueError
        If the id is unknown; the closest ids are named.
    """
    if id.startswith((FOLDER_PREFIX, HUB_PREFIX)):
        return VlmEntry(id, "model in transformers' format", _DEFAULT_SIZE, None, "not stated", id, "")
    rows = {entry.id: entry for entry in BUILT_IN}
    if id in dual_encoders:
        raise ValueError(
            f"{id!r} is a dual encoder and writes no text: load it with load_model({id!r}) (notebooks: the parameter "
            f"`model`). Generative models: {', '.join(rows)}"
        )
    if id not in rows:
        raise ValueError(
            f"unknown vision-language model {id!r}.{suggest(id, rows)}{place_hint(id)} {FOLDER_PREFIX}PATH and "
            f"{HUB_PREFIX}OWNER/NAME work too"
        )
    return rows[id]


def place_hint(id: str) -> str:
    """Part of an error message for an id that is a path or a repository without its prefix; else empty."""
    owner, slash, name = id.partition("/")
    if id and (Path(id).is_dir() or owner in ("", ".", "..") or id[0] == "~" or "\\" in id):
        return f" A folder on this computer is {FOLDER_PREFIX}{id}."
    repository = f"A repository on the hub is {HUB_PREFIX}{id}, a" if name and "/" not in name else "A"
    return f" {repository} folder on this computer {FOLDER_PREFIX}PATH." if slash else ""


def fetch_command(id: str) -> str:
    """Command that brings a model's weights onto this computer."""
    if id.startswith(HUB_PREFIX):
        return f"hf download {id.removeprefix(HUB_PREFIX)}"
    return f"python data_scripts/fetch_weights.py {id}"
