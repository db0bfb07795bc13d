"""One training step of masked prediction as on paper: loops over images, no packing and no padding."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def features(encoder, image: Tensor, kept: list[int] | None = None) -> Tensor:
    """Features of the patches `kept` (None: all) of one image (C, S, S), which see nothing but each other."""
    x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(image[None])))
    prefix = encoder.num_prefix_tokens
    if kept is not None:
        x = torch.cat([x[:, :prefix], x[:, prefix:][:, kept]], dim=1)
    for block in encoder.blocks:
        x = block(x)
    return encoder.fc_norm(encoder.norm(x))[0, prefix:]


def predict(predictor, context: Tensor, kept: list[int], block: list[int]) -> Tensor:
    """What the predictor says of the patches of one target block."""
    seen = predictor.embed(context) + predictor.positions[kept]
    x = torch.cat([seen, predictor.mask_token + predictor.positions[block]])[None]
    for layer in predictor.blocks:
        x = layer(x)
    return predictor.project(predictor.norm(x[0, len(kept) :]))


def plain_loss(model, images: Tensor, contexts: Tensor, targets: Tensor, distance, sigreg=None) -> Tensor:
    """The loss of a batch. `distance(prediction, target)`: tensors of one patch -> its mean over dimensions.
    `sigreg(tokens)`: None for I-JEPA; else the loss is the mean of both parts (lambda 0.5, convex)."""
    losses, tokens = [], []
    for image, context, blocks in zip(images, contexts.flatten(1), targets.flatten(2), strict=True):
        if model.target is None:
            wanted = model.projector(features(model.encoder, image))
        else:
            with torch.no_grad():
                whole = features(model.target, image)
                wanted = layer_norm(whole, whole.shape[-1:])
        kept = context.nonzero()[:, 0].tolist()
        seen = features(model.encoder, image, kept)
        for block in blocks:
            places = block.nonzero()[:, 0].tolist()
            predictions = predict(model.predictor, seen, kept, places)
            losses += [distance(predictions[i], wanted[place]) for i, place in enumerate(places)]
        tokens.append(wanted)
    prediction = torch.stack(losses).mean()
    return prediction if sigreg is None else 0.5 * prediction + 0.5 * sigreg(torch.stack(tokens))
