import copy

import pytest
import torch

from medrobust_lib import load_model
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens, find_image_tower


class Pair(DualEncoder):
    """A shared layer, a layer of each tower, and one that nothing uses."""

    def __init__(self, *, shared_only=False):
        super().__init__(
            id="pair",
            preprocessing=Preprocessing(8, "squash", "bilinear", mean=(0,) * 3, std=(1,) * 3),
            embed_dim=3,
            context_length=4,
            logit_scale=1.0,
            provenance={},
        )
        self.shared, self.image, self.text, self.unused = (torch.nn.Linear(3, 3) for _ in range(4))
        self.norm = torch.nn.BatchNorm2d(3)
        self.shared_only = shared_only

    def _image_features(self, pixels):
        features = self.shared((pixels if self.shared_only else self.norm(pixels)).mean(dim=(2, 3)))
        return features if self.shared_only else self.image(features)

    def tokenize(self, texts):
        return Tokens(torch.ones(len(texts), 4, dtype=torch.int64), torch.ones(len(texts), 4, dtype=torch.bool))

    def embed_tokens(self, tokens):
        return tokens.ids[..., None].expand(-1, -1, 3).to(self.device, self.dtype)

    def _text_features(self, embeddings, tokens):
        return self.text(self.shared(embeddings.sum(dim=1)))


def test_the_image_tower_is_what_images_alone_depend_on():
    model = Pair().eval()
    tower = find_image_tower(model)
    assert set(tower.parameters) == {"image.weight", "image.bias", "norm.weight", "norm.bias"}
    assert tower.norms == {"norm": model.norm}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(tower.parameters)


def test_finding_changes_no_tensor():
    model = Pair().eval()
    before = copy.deepcopy(model.state_dict())
    find_image_tower(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_an_own_image_tower_is_refused():
    with pytest.raises(ValueError, match="pair: image features depend on no parameter of their own"):
        find_image_tower(Pair(shared_only=True).eval())


def test_the_tower_of_the_demo_model_is_all_of_visual():
    model = copy.deepcopy(load_model("demo-clip", device="cpu"))
    expected = {f"model.visual.{name}" for name, _ in model.model.visual.named_parameters()}
    assert set(find_image_tower(model).parameters) == expected
