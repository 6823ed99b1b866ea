"""The generative model itself: noisy images and a question to text, to log-probabilities, or to a feature.

Noise is added to [0, 1] pixels of a stated size, before the model's own processor normalises, resizes or tiles
them: everything behind the noise belongs to the base classifier of a certificate.
"""

import itertools
import numbers
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor
from torch.nn import functional

from medrobust_lib.checks import check_whole
from medrobust_lib.models import weights
from medrobust_lib.models.catalogue import CAVEATS, CONFIG_NAME, HUB_PREFIX
from medrobust_lib.models.completion import Completion, RowSampler
from medrobust_lib.models.dual_encoder import SOUND_TYPES, BrokenFeaturesError
from medrobust_lib.models.geometry import ImageInput, Preprocessing, check_pixels, prepare_images
from medrobust_lib.models.loading import QUANTISED, check_kind, find_model, preferred, quantised_options, settled

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_RESCALING: weights.Settings = {"do_rescale": (True,), "rescale_factor": (1 / 255,)}
_TILING = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")  # what image processors call it
_ANY_RESOLUTION = 448  # where the tower states no size: a whole number of patches of 14 and of 16 px, merged by two
_IGNORED_LABEL = -100  # of tokens that the loss of transformers' models leaves out
_TOWER_WORKING_SET = 64  # activations of an image tower, in float32 copies of its input, with a margin


class VisionLanguageModel(torch.nn.Module):
    """A model of ``transformers.AutoModelForImageTextToText`` that answers questions about images in pixel units.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The network, with its weights.
    processor : transformers.ProcessorMixin
        Its image processor, tokenizer and chat template.
    id : str
        Name of the model.
    image_size : int
        S, the side in pixels at which noise is added.
    image_options : dict
        Settings of the image processor that differ from its own.
    provenance : dict
        JSON values: source, files with their SHA-256, licence.
    caveats : sequence of str
        What certificates and result cards of this model must say.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        id: str,
        image_size: int,
        image_options: dict[str, Any],
        provenance: dict[str, Any],
        caveats: Sequence[str] = (),
    ) -> None:
        from transformers import GenerationConfig  # transformers takes seconds to import

        super().__init__()
        self.model = model
        self.processor = processor
        self.id = id
        self.image_size = image_size
        self.image_options = image_options
        self.provenance = provenance
        self.caveats = tuple(caveats)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # a decoder goes on from the last position of every row
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        own = model.generation_config
        # Beams, penalties and truncations of a checkpoint's own settings would be another decoder than the one stated.
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    @property
    def device(self) -> torch.device:
        """Device on which the model lies."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, those that are quantised left out."""
        return self.model.dtype

    @property
    def precision(self) -> str:
        """Name of `dtype`, and in front of it that of the quantisation, if there is one."""
        name, found = str(self.dtype).removeprefix("torch."), getattr(self.model.config, "quantization_config", None)
        if found is None:
            return name
        eight = getattr(found, "load_in_8bit", False)
        return f"{'int8' if eight else getattr(found, 'bnb_4bit_quant_type', found.quant_method)} with {name}"

    def prepare(self, images: ImageInput | Sequence[Any]) -> Tensor:
        """Bring images to the size at which noise is added; nothing is cut off.

        Parameters
        ----------
        images : array or sequence
            As `DualEncoder.prepare` takes them. Images that are not square are centred on a black square.

        Returns
        -------
        Tensor
            float32 [n, 3, S, S] in [0, 1], on the CPU.
        """
        letterbox = Preprocessing(self.image_size, "letterbox", "bicubic", mean=(0.0,) * 3, std=(1.0,) * 3)
        return prepare_images(images, letterbox)

    def generate(
        self,
        pixels: Tensor,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Answer a question about each image.

        Parameters
        ----------
        pixels : float [n, 3, S, S]
            In [0, 1] before noise; noise may carry values out of it.
        prompt : str
            The question, the same for all images; it is put into the model's own chat template.
        max_new_tokens : int
            Longer answers are cut.
        temperature : float
            0 decodes greedily; above, tokens are drawn from the softmax at this temperature.
        seed : int, or sequence of n int
            Of the drawing. One for each image makes an answer independent of the batch it is computed in; a single
            seed stands for ``seed, seed + 1, ...``.

        Returns
        -------
        list of n str

        Raises
        ------
        TypeError, ValueError
            For pixels of another type, shape or range, or a parameter out of range.
        BrokenFeaturesError
            For a model whose scores of the next token are not finite: it would write token 0 for ever.
        """
        answers = self.complete(pixels, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return [answer.text for answer in answers]

    @torch.inference_mode()
    def complete(
        self,
        pixels: Tensor,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """As `generate`, saying of each text whether the model ended it."""
        check_pixels(pixels, image_size=self.image_size, model=self.id)
        check_whole("max_new_tokens", max_new_tokens, hint="; an answer has at least one token")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: 0 (greedy) or a finite number above")
        seeds = [seed + row for row in range(len(pixels))] if isinstance(seed, numbers.Integral) else list(seed)
        if len(seeds) != len(pixels):
            raise ValueError(f"{len(seeds)} seeds for {len(pixels)} images; give one integer, or one for each image")
        inputs = self._inputs(pixels, [self._chat(prompt)] * len(pixels))
        rows_without_best = torch.zeros(len(pixels), dtype=torch.bool, device=self.device)

        def watch(input_ids: Tensor, scores: Tensor) -> Tensor:
            """Scores, unchanged; the largest of NaN would be token 0."""
            rows_without_best.logical_or_(~scores.amax(dim=-1).isfinite())
            return scores

        processors = [watch, *([RowSampler(temperature, seeds, self.device)] if temperature > 0 else [])]
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=processors)
        broken = int(rows_without_best.sum())
        if broken:
            raise BrokenFeaturesError(
                f"{self.id} in {self.precision}: the scores of the next token are not finite "
                f"for {broken} of {len(pixels)} images, so what it wrote is no answer. {SOUND_TYPES}"
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        ends = torch.as_tensor(self.model.generation_config.eos_token_id, device=new.device).reshape(-1)
        finished = torch.isin(new, ends).any(dim=1).tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [Completion(text.strip(), bool(end)) for text, end in zip(texts, finished, strict=True)]

    def log_likelihood(self, pixels: Tensor, prompt: str, answer: str) -> Tensor:
        """Log-probability of an answer; differentiable with respect to ``pixels`` where the processor is.

        Parameters
        ----------
        pixels : float [n, 3, S, S]
        prompt, answer : str
            The answer follows the question after the white space with which the chat template ends, or one space.

        Returns
        -------
        float32 [n]
            Sum over the answer's tokens and the token that ends it.

        Raises
        ------
        RuntimeError
            If the pixels require a gradient and the model's image processor passes none on.
        """
        check_pixels(pixels, image_size=self.image_size, model=self.id)
        asked, tokenizer = self._chat(prompt), self.processor.tokenizer
        # Of several tokens that end an answer the one that ends a turn of the chat: Gemma's is not the tokenizer's.
        ends = np.atleast_1d(self.model.generation_config.eos_token_id).tolist()
        end = next((token for token in tokenizer.convert_ids_to_tokens(ends) if token in asked), tokenizer.eos_token)
        space = "" if asked[-1:].isspace() or not answer else " "
        inputs = self._inputs(pixels, [f"{asked}{space}{answer}{end or ''}"] * len(pixels))
        question = self._inputs(pixels[:1].detach(), [asked])["input_ids"][0].tolist()
        both = zip(question, inputs["input_ids"][0].tolist(), strict=False)
        n_asked = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        labels = inputs["input_ids"].clone()
        labels[:, :n_asked] = _IGNORED_LABEL
        logits = self.model(**inputs).logits[:, :-1].float()
        losses = functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=_IGNORED_LABEL, reduction="none"
        )
        return -losses.sum(dim=1)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm features of texts: the sum of the language model's word embeddings over a text's tokens.

        In a decoder the last states foretell the next word, and are nearly parallel for all texts; word embeddings tell
        texts apart better, without their order.

        Parameters
        ----------
        texts : sequence of str
            k texts; an empty one has the feature of the model's end token.

        Returns
        -------
        float32 [k, d]
        """
        tokenizer = self.processor.tokenizer
        words = [tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id] for text in texts]
        embed = self.model.get_input_embeddings()
        sums = [embed(torch.tensor(ids, device=self.device)).float().sum(dim=0) for ids in words]
        return functional.normalize(torch.stack(sums), dim=-1)

    def bytes_per_copy(self, prompt: str, max_new_tokens: int) -> int:
        """Estimate the memory that one noisy copy takes in `complete`, beside the weights.

        Parameters
        ----------
        prompt : str
        max_new_tokens : int

        Returns
        -------
        int
            The cache of keys and values (exact), the activations of one decoder layer over all tokens,
            and 64 float32 copies of what the image tower reads; the last two are a margin, not a measurement.
        """
        inputs = self._inputs(torch.zeros(1, 3, self.image_size, self.image_size), [self._chat(prompt)])
        tokens = inputs["input_ids"].shape[1] + max_new_tokens
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cached = 2 * config.num_hidden_layers * heads * width
        activations = 4 * config.hidden_size + 3 * config.intermediate_size
        decoder = tokens * (cached + activations) * self.dtype.itemsize
        return decoder + _TOWER_WORKING_SET * inputs["pixel_values"].numel() * torch.float32.itemsize

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers get a copy. transformers hangs functions on a used model that cannot be sent, and keeps facts about
        # its class in the process that built it; so the copy is built there, from the configuration and the weights.
        if getattr(self.model.config, "quantization_config", None) is not None:
            raise TypeError(f"{self.id} in {self.precision} cannot be sent to another process: use jobs=1")
        facts = {name: getattr(self, name) for name in ("id", "image_size", "image_options", "provenance", "caveats")}
        network = (type(self.model), self.model.config, self.model.generation_config, self.model.state_dict())
        return _rebuilt, (network, self.processor, facts)

    def __repr__(self) -> str:
        # The network's hundreds of layers would drown the facts; print(model.model) shows them.
        return (
            f"VisionLanguageModel(id={self.id!r}, {type(self.model).__name__}, noise at {self.image_size} px, "
            f"dtype={self.precision}, device={str(self.device)!r})"
        )

    def _chat(self, prompt: str) -> str:
        """The prompt in the model's chat template, with the place of the image."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt={prompt!r}: give the question as text")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def _inputs(self, pixels: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the network reads, on its device; pixels keep their gradient if they have one."""
        options = {"do_rescale": False, "return_tensors": "pt", **self.image_options}
        start = self.processor.tokenizer.bos_token
        if start and texts[0].startswith(start):  # the template wrote it; the tokenizer must not write a second one
            options["add_special_tokens"] = False
        images = [[image] for image in pixels.float()]
        inputs = self.processor(images=images, text=list(texts), padding=True, **options)
        if pixels.requires_grad and torch.is_grad_enabled() and not inputs["pixel_values"].requires_grad:
            raise RuntimeError(f"the image processor of {self.id} passes no gradient on to the pixels")
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }


def _rebuilt(network: tuple[Any, ...], processor: Any, facts: dict[str, Any]) -> VisionLanguageModel:
    """Build a copy of a model in another process."""
    kind, config, decoding, tensors = network
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    model.generation_config = decoding
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.to(next(iter(tensors.values())).device)  # the buffers that are not among the weights
    return VisionLanguageModel(model.requires_grad_(False).eval(), processor, **facts).eval()


def load_vlm(
    id: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights_dir: str | Path | None = None,
    offline: bool | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> VisionLanguageModel:
    """Load a generative vision-language model, ready for inference.

    Parameters
    ----------
    id : str
        An id of `list_vlms`, ``local-dir:PATH`` for a folder in transformers' format, or ``hf:OWNER/NAME``.
    device, dtype, weights_dir, offline
        As in `load_model`; dtype also ``"int8"`` or ``"nf4"``, by the package bitsandbytes, beside bfloat16. Answers
        may depend on the batch they are computed in. In float32 this is tried on two images; if they do, and in every
        other type, `caveats` says so.
    image_size : int, optional
        S, the side in pixels at which noise is added and radii are meant; default: the table's, else that of the image
        tower. The tiles that an image processor would cut are switched off where it has a switch.
    revision : str, optional
        Commit of the hub repository, 40 hexadecimal digits.
    trust_remote_code : bool
        Run code that comes with the weights. Only with a pinned `revision`, so that it cannot change unseen.

    Returns
    -------
    VisionLanguageModel
        In evaluation mode, no parameter requiring a gradient.

    Raises
    ------
    ValueError
        For an unknown id, device or dtype, weights that do not fit, a wrong SHA-256, or remote code that is not pinned.
    FileNotFoundError
        If the weights are missing; names the places looked at and the command that fetches them.
    ImportError
        If transformers needs another package for this model (num2words for SmolVLM2) or type (bitsandbytes); names it.
    """
    entry = find_model(id, generative=True)
    if trust_remote_code and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"trust_remote_code=True runs code from the repository of {id!r}: pin it with revision=COMMIT "
            f"(40 hexadecimal digits, not {revision!r}), and read it first"
        )
    if image_size is not None:
        check_whole("image_size", image_size, hint=" pixels, nor None for the model's own")
    device, dtype = preferred(device, dtype)
    plain = "bfloat16" if dtype in QUANTISED else dtype  # of what is not quantised
    target, precision, weights_dir, offline = settled(device, plain, weights_dir, offline)
    quantised = quantised_options(dtype, target) if dtype in QUANTISED else {}
    check_kind(entry, weights_dir=weights_dir)
    from transformers import AutoModelForImageTextToText  # transformers takes seconds to import

    folder = weights.model_folder(entry, weights_dir)
    place = entry.source.removeprefix(HUB_PREFIX) if folder is None else str(folder)
    files = {} if folder is None else weights.check_hashes(folder)
    pinned = {"revision": revision} if folder is None else {}
    # Code may also lie in another repository than the weights: it is pinned, too.
    code = {"trust_remote_code": trust_remote_code, **({"code_revision": revision} if trust_remote_code else {})}
    options = {"dtype": precision, **quantised, **pinned, **code}
    try:
        with weights.hub_access(offline=offline), _no_progress_bar(), torch.random.fork_rng(devices=[]):
            network = weights.read_pretrained(AutoModelForImageTextToText, place, **options)
            processor = _read_processor(place, **pinned, **code)
    except OSError as error:
        raise weights.missing_weights(entry, weights_dir=weights_dir, offline=offline, reason=error) from error
    if folder is None:
        snapshot = try_to_load_from_cache(place, CONFIG_NAME, revision=revision)
        if isinstance(snapshot, str):
            revision, files = Path(snapshot).parent.name, weights.file_hashes(Path(snapshot).parent)
    size_of_tower = getattr(getattr(network.config, "vision_config", None), "image_size", _ANY_RESOLUTION)
    switches = {name: False for name in _TILING if hasattr(processor.image_processor, name)}
    vlm = VisionLanguageModel(
        network.requires_grad_(False).eval().to(target),
        processor,
        id=id,
        image_size=image_size or entry.image_size or int(np.max(size_of_tower)),
        image_options={**switches, **entry.image_options},
        provenance={**weights.provenance(entry, files), "revision": revision},
    ).eval()
    vlm.caveats = _batch_caveats(vlm)
    return vlm


def _batch_caveats(vlm: VisionLanguageModel) -> tuple[str, ...]:
    """What must be said of a model whose answers depend on their batch, or may."""
    model = f"{vlm.id} in {vlm.precision}"
    if vlm.precision != "float32":
        return (CAVEATS["batch_untried"].format(model=model),)
    noisy = 0.5 + 0.5 * torch.randn(2, 3, *[vlm.image_size] * 2, generator=torch.Generator().manual_seed(0))
    answers = partial(vlm.generate, prompt="What is in this image?", max_new_tokens=4)
    same = answers(noisy) == answers(noisy[:1]) + answers(noisy[1:])
    return () if same else (CAVEATS["batch_differs"].format(model=model),)


def _read_processor(place: str, **options: Any) -> "ProcessorMixin":
    """Image processor, tokenizer and chat template, all of them."""
    from transformers import AutoProcessor  # transformers takes seconds to import

    try:
        with weights.explained_errors(place):
            processor = AutoProcessor.from_pretrained(place, **options)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot make the processor of {place}; are its tokenizer's files complete? {reason}"
        ) from error
    # Its processor is handed noisy [0, 1] pixels, which are what 8-bit images become by this rescaling alone.
    rescaling = {name: getattr(processor.image_processor, name, None) for name in _RESCALING}
    weights.check_settings(rescaling, _RESCALING, source=f"{place}, settings of the image processor")
    if processor.chat_template is None:
        raise ValueError(f"{place} has no chat template, so its question has no agreed form; add chat_template.jinja")
    return processor


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a progress bar over what a notebook or a command shows, for a while."""
    from transformers.utils import logging  # transformers takes seconds to import

    shown, of_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        # The hub's own environment variable has the last word, and it says so.
        warnings.filterwarnings("ignore", "Cannot (en|dis)able progress bars")
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Cannot (en|dis)able progress bars")
            if shown:
                logging.enable_progress_bar()  # and that of the hub
            (enable_progress_bars if of_hub else disable_progress_bars)()
