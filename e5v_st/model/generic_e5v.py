"""The forward of any family: the stock model as it is, or its stock language model over a tree of prompts.

Nothing here knows a family by name, but the masks at the end, which are Gemma's. For a tree, the stock model runs over
one prompt of each distinct group of images, and is stopped at the *door* of its language model: what it would have
passed on holds the features of the images. Then the language model runs once over the nodes of the tree (see
``tree_e5v``)::

    input_ids, pixels -> stock model -> | door: inputs_embeds, visual_pos_masks, deepstack_visual_embeds, ...
                                        |                 features of each image
    tree.ids ----------- embedding -----|------> nodes -> stock language model -> tree.last

Positions come from the model's own ``get_rope_index`` where it has one. What keeps branches apart is the attention of
``sharing_e5v``. Families that read images in both directions have a mask for each root of the tree, if it has images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from .pixels_e5v import from_samples, join_groups
from .planning_e5v import in_order
from .sharing_e5v import Branches
from .skipping_e5v import only_rows, stop_at_the_door
from .tree_e5v import Block

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .tree_e5v import Part, Tree

#: Tokens, with padding, that go through a model together on a CPU where nothing is shared: more are no faster.
PADDED_TOKENS = 512
#: What the language model gets of a group: its features, and those of deeper layers, where a family has them.
Seen = tuple[torch.Tensor, ...]
#: Fields that say for each token what it is.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
#: What a stock model may pass on to its language model. Anything else would be lost on the way to a tree.
_KNOWN = frozenset(
    (
        *("inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache", "input_ids"),
        *("visual_pos_masks", "deepstack_visual_embeds", "per_layer_inputs", "mm_token_type_ids", "return_dict"),
        *("output_hidden_states", "output_attentions"),
    )
)


def stock_states(model: Any, features: Mapping[str, Any], **kwargs: Any) -> torch.Tensor:
    """Runs the stock model over a whole batch.

    Args:
        model: A family's model without its head.
        features: See ``features_e5v``; padded on the right.
        **kwargs: Arguments of the model.

    Returns:
        Hidden states after the final norm ``(n, tokens, d)``.
    """
    tokens = {name: features[name] for name in ("input_ids", "attention_mask", *TOKEN_TYPES) if name in features}
    pixels = _pixels_of_all(model, features)
    found: torch.Tensor = model(**tokens, **pixels, **{"use_cache": False, **kwargs}).last_hidden_state
    return found


def padded_last_states(
    model: PreTrainedModel, features: Mapping[str, Any], lengths: Sequence[int], **kwargs: Any
) -> torch.Tensor:
    """Runs the stock model over a batch in which nothing is shared, prompts of like length together.

    Args:
        model: A family's model without its head.
        features: See ``features_e5v``; shared.
        lengths: Tokens of each prompt.
        **kwargs: Arguments of the model.

    Returns:
        Each prompt's last hidden state after the final norm ``(n, 1, d)``.
    """
    found, order = zip(*_run_padded(model, features, torch.arange(len(lengths)), lengths, **kwargs), strict=True)
    return in_order(found, order)


def _run_padded(
    model: PreTrainedModel, features: Mapping[str, Any], prompts: torch.Tensor, lengths: Sequence[int], **kwargs: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields last states ``(some, 1, d)``, and the numbers of their prompts, for some prompts of these lengths."""
    for places in _of_like_length(lengths, _padded_tokens(model)):
        together = prompts[places]
        rows, last = torch.arange(len(places)), torch.tensor([lengths[place] - 1 for place in places])
        with only_rows(rows, last):
            states = stock_states(model, _some(features, together), **kwargs)
        yield states[rows.to(states.device), last.to(states.device)].unsqueeze(1), together


def _padded_tokens(model: PreTrainedModel) -> float:
    return PADDED_TOKENS if model.device.type == "cpu" else math.inf


def _of_like_length(lengths: Sequence[int], budget: float) -> list[list[int]]:
    """Groups prompts, longest first, so that each group has at most so many tokens, padding included."""
    groups: list[list[int]] = []
    for prompt in sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups


def _some(features: Mapping[str, Any], prompts: torch.Tensor) -> dict[str, Any]:
    """Returns the features of some prompts of a shared batch."""
    own: dict[str, Any] = dict(_rows(features, prompts))
    shown = _groups_of(features, prompts)
    if max(shown) >= 0:
        own["groups"], own["image_index"] = features["groups"], torch.tensor(shown)
    return own


def _pixels_of_all(model: PreTrainedModel, features: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the pixels of all items of a batch, in their order."""
    groups = features.get("groups")
    if groups is None:
        return _to(from_samples(features), model)
    return _to(join_groups([groups[index] for index in features["image_index"].tolist() if index >= 0]), model)


def _to(pixels: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Moves pixels to the model's device, and those that are fractions to its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None, non_blocking=True)
        for name, value in pixels.items()
    }


def tree_states(
    model: PreTrainedModel,
    features: Mapping[str, Any],
    parts: Sequence[Part],
    *,
    sharing: str,
    image_id: int,
    known: MutableMapping[int, Seen] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Runs the stock language model over the trees of a batch, part by part.

    Prompts with images that share next to nothing go through the stock model as they are: a tree costs it about 4 %.

    Args:
        model: A family's model without its head.
        features: See ``features_e5v``.
        parts: Hold each prompt of this batch once.
        sharing: ``"tree"`` or ``"masks"``, see ``backbone_e5v``.
        image_id: The image token's id.
        known: What is known already of groups, by their numbers; what is found out is added. By default each part
            forgets it again.
        **kwargs: Arguments of the language model.

    Returns:
        Each prompt's last hidden state after the final norm ``(n, 1, d)``.
    """
    done: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in parts:
        if known is None and len(part.images) and _shares_little(part.tree):
            done += _run_padded(model, features, part.prompts, [len(path) for path in part.tree.paths], **kwargs)
        else:
            own = {} if known is None else known
            done.append((_states_of_part(model, features, part, sharing, image_id, own, **kwargs), part.prompts))
    found, order = zip(*done, strict=True)
    return in_order(found, order)


def _shares_little(tree: Tree) -> bool:
    return len(tree.ids) >= 0.97 * sum(map(len, tree.paths))


def _states_of_part(
    model: PreTrainedModel,
    features: Mapping[str, Any],
    part: Part,
    sharing: str,
    image_id: int,
    known: MutableMapping[int, Seen],
    **kwargs: Any,
) -> torch.Tensor:
    language_model: Any = model.get_decoder()
    rows, shown = _rows(features, part.prompts), _groups_of(features, part.prompts)
    tree = part.tree.map(lambda tensor: tensor.to(rows["input_ids"].device, non_blocking=True))
    embeddings = model.get_input_embeddings()(tree.ids)
    given: dict[str, Any] = {"position_ids": _positions(model, features, rows, shown, tree)}
    if len(tree.image_nodes):
        groups = part.images.tolist()
        if missing := [group for group in groups if group not in known]:
            door = _at_the_door(model, features, rows, shown, missing)
            known.update(zip(missing, _by_group(door), strict=True))
        images, *deep = (torch.cat(each) for each in zip(*(known[group] for group in groups), strict=True))
        # Not in place: in training, embeddings may be asked for a gradient
        embeddings = embeddings.index_copy(0, tree.image_nodes, images[tree.image_features].to(embeddings))
        if deep:
            there = torch.zeros_like(tree.ids, dtype=torch.bool).index_fill_(0, tree.image_nodes, True)
            given["visual_pos_masks"] = there.unsqueeze(0)
            given["deepstack_visual_embeds"] = [each[tree.image_features] for each in deep]
    if getattr(language_model, "hidden_size_per_layer_input", 0):
        # Gemma 4 looks up a second embedding by id, in which images count as padding
        ids = tree.ids.index_fill(0, tree.image_nodes, language_model.config.pad_token_id)
        given["per_layer_inputs"] = language_model.get_per_layer_inputs(ids.unsqueeze(0), None)
    # A mask of four dimensions is handed on as it is, and nobody looks at it where there are branches
    given["attention_mask"] = unused = embeddings.new_zeros(1, 1, 1, 1)
    given["branches"] = Branches(tree.blocks)
    if sharing == "masks":
        given["attention_mask"] = dict.fromkeys(language_model.config.layer_types, unused)
        if not _is_causal(language_model.config, part.tree):
            masks = full_masks(language_model.config, part.tree, rows["input_ids"].cpu().numpy(), image_id)
            given["branches"] = _masked(masks, part.tree, embeddings.device)
    with only_rows(torch.zeros_like(tree.last), tree.last):
        states = language_model(
            inputs_embeds=embeddings.unsqueeze(0), **{"use_cache": False, **given, **kwargs}
        ).last_hidden_state
    found: torch.Tensor = states[0, tree.last.to(states.device)].unsqueeze(1)
    return found


def _rows(features: Mapping[str, Any], prompts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tokens of some prompts, padded no longer than they need."""
    names = [name for name in ("input_ids", "attention_mask", *TOKEN_TYPES) if name in features]
    rows = {name: features[name][prompts.to(features[name].device)] for name in names}
    longest = int(rows["attention_mask"].sum(1).max())
    return {name: values[:, :longest] for name, values in rows.items()}


def _groups_of(features: Mapping[str, Any], prompts: torch.Tensor) -> list[int]:
    """Returns the group of images that each of some prompts shows, ``-1`` for none."""
    if "image_index" not in features:
        return [-1] * len(prompts)
    shown: list[int] = features["image_index"].cpu()[prompts.cpu()].tolist()
    return shown


def _positions(
    model: Any, features: Mapping[str, Any], rows: Mapping[str, torch.Tensor], shown: Sequence[int], tree: Tree
) -> torch.Tensor:
    """Returns the position of each node, ``(1, nodes)`` or ``(3, 1, nodes)``."""
    if not len(tree.image_nodes) or not hasattr(model, "get_rope_index"):
        return tree.positions.unsqueeze(0)
    groups = [features["groups"][group] for group in shown if group >= 0]
    return _positions_of_rows(model, rows, groups)[:, tree.prompts, tree.positions].unsqueeze(1)


def _positions_of_rows(
    model: Any, rows: Mapping[str, torch.Tensor], groups: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """Returns the positions of whole prompts, ``(n, tokens)`` or ``(3, n, tokens)``.

    Args:
        model: A family's model.
        rows: The prompts.
        groups: The pixels of each that shows images; of none if they show none.
    """
    ids = rows["input_ids"]
    if not groups or not hasattr(model, "get_rope_index"):
        return torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    where: torch.Tensor
    where, _ = model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=rows["mm_token_type_ids"],
        image_grid_thw=torch.cat([group["image_grid_thw"] for group in groups]).to(ids.device),
        attention_mask=rows["attention_mask"],
    )
    return where


def _at_the_door(
    model: Any,
    features: Mapping[str, Any],
    rows: Mapping[str, torch.Tensor],
    shown: Sequence[int],
    groups: Sequence[int],
) -> dict[str, Any]:
    """Returns what the stock model passes to its language model, with the features of some groups of images.

    Args:
        model: A family's model.
        features: See ``features_e5v``.
        rows: A part's prompts.
        shown: The group that each of them shows.
        groups: Some groups of the part.
    """
    firsts = torch.tensor([shown.index(group) for group in groups], device=rows["input_ids"].device)
    own = {name: values[firsts] for name, values in rows.items()}
    pixels = _to(join_groups([features["groups"][group] for group in groups]), model)
    caught = _passed_on(model, {**own, **pixels})
    where = own["input_ids"] == model.config.image_token_id
    caught["features"], caught["counts"] = caught["inputs_embeds"][where], where.sum(1).tolist()
    return caught


def _by_group(door: Mapping[str, Any]) -> Iterator[Seen]:
    """Yields what each group of :func:`_at_the_door` has of it."""
    found = [door["features"], *(door.get("deepstack_visual_embeds") or ())]
    return zip(*(each.split(door["counts"]) for each in found), strict=True)


def _passed_on(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns what the stock model passes to its language model, which is not run; refuses what would be lost."""
    caught = stop_at_the_door(model, **inputs, use_cache=False)
    unknown = sorted(name for name, value in caught.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise RuntimeError(
            f"{type(model).__name__} passes {', '.join(unknown)} to its language model, which E5-V does not know: "
            "load it with share_prefixes=False"
        )
    return caught


# ---- a forked cache ----

#: Tokens that texts must save together, so that a pass of its own over what they begin with is worth it. A GPU takes
#: about as long for few tokens as for some thousands; its number is reckoned, not measured.
WORTH_A_FORK, WORTH_A_FORK_ON_GPU = 64, 4096
#: Tokens that a recurrent layer computes at once on a CPU. transformers' own number is 64, to which it pads each text.
PIECE = 16


def short_pieces(model: PreTrainedModel) -> dict[str, int]:
    """Returns the arguments of a model with recurrent layers that have them compute short texts in short pieces.

    transformers hands them on to its function for these layers, where another library does not compute them.
    """
    return {"chunk_size": PIECE} if model.device.type == "cpu" else {}


def forked_states(
    model: PreTrainedModel, features: Mapping[str, Any], parts: Sequence[Part], **kwargs: Any
) -> torch.Tensor:
    """Runs prompts that begin alike from the cache of what they begin with, for layers whose state runs on.

    Such a layer has no place for branches. But what it knows of a prefix can be copied, once for each prompt, and then
    the rests of the prompts stand side by side::

        <s> I I I red              <s> I I I -> cache -> red
        <s> I I I has stripes                    copy -> has stripes

    Prompts about one image share it, and texts what all of them begin with: the head of the chat format, and an
    instruction, if there is one.

    Args:
        model: A family's model without its head.
        features: See ``features_e5v``.
        parts: Hold each prompt of this batch once.
        **kwargs: Arguments of the model.

    Returns:
        Each prompt's last hidden state after the final norm ``(n, 1, d)``.
    """
    done: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in parts:
        shown = _groups_of(features, part.prompts)
        for group in dict.fromkeys(shown):
            places = [place for place, own in enumerate(shown) if own == group]
            members, lengths = part.prompts[places], [len(part.tree.paths[place]) for place in places]
            pixels = features["groups"][group] if group >= 0 else None
            if same := count_forked(model, features, members, lengths, has_images=pixels is not None):
                forked = _fork(model, _rows(features, members), pixels, same, lengths, **kwargs)
                done += ((states, members[some]) for states, some in forked)
            else:
                done += _run_padded(model, features, members, lengths, **kwargs)
    found, order = zip(*done, strict=True)
    return in_order(found, order)


def count_forked(
    model: PreTrainedModel,
    features: Mapping[str, Any],
    prompts: torch.Tensor,
    lengths: Sequence[int],
    *,
    has_images: bool,
) -> int:
    """Returns how many tokens prompts begin with, if they are computed once; none where that is not worth it.

    Args:
        model: A family's model without its head.
        features: See ``features_e5v``.
        prompts: Numbers of some prompts in the batch ``(some,)``.
        lengths: Tokens of each.
        has_images: Whether they show images, all the same: the tower's work is worth more than its tokens.
    """
    ids = features["input_ids"][prompts.to(features["input_ids"].device), : min(lengths) - 1]  # each keeps one
    same = int((ids == ids[:1]).all(0).int().cumprod(0).sum())
    worth = 1 if has_images else WORTH_A_FORK if model.device.type == "cpu" else WORTH_A_FORK_ON_GPU
    return same if same * (len(ids) - 1) >= worth else 0


def _fork(
    model: Any,
    rows: Mapping[str, torch.Tensor],
    pixels: Mapping[str, torch.Tensor] | None,
    same: int,
    lengths: Sequence[int],
    **kwargs: Any,
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yields last states ``(some, 1, d)``, and the places of their prompts, for prompts that begin alike.

    Args:
        model: A family's model without its head.
        rows: The prompts.
        pixels: Of what they all show, if they show images.
        same: Tokens that they begin with.
        lengths: Tokens of each.
        **kwargs: Arguments of the model.
    """
    ids, embed, language_model = rows["input_ids"], model.get_input_embeddings(), model.get_decoder()
    positions = _positions_of_rows(model, rows, [] if pixels is None else [pixels] * len(ids))
    if pixels is None:
        begin = embed(ids[:1, :same])
    else:
        first = {name: values[:1] for name, values in rows.items()}
        begin = _passed_on(model, {**first, **_to(pixels, model)})["inputs_embeds"][:, :same]
    known = DynamicCache(config=language_model.config)
    none, how = torch.zeros(0, dtype=torch.long), {**kwargs, "use_cache": True}
    with only_rows(none, none):  # the cache is all that is wanted
        language_model(inputs_embeds=begin, position_ids=positions[..., :1, :same], past_key_values=known, **how)
    for places in _of_like_length([length - same for length in lengths], _padded_tokens(model)):
        cache = copy.deepcopy(known)
        cache.reorder_cache(torch.zeros(len(places), dtype=torch.long, device=ids.device))  # a copy for each prompt
        # Padding stands on the right, behind all that is read, so no mask is needed
        some, last = torch.arange(len(places)), torch.tensor([lengths[place] - 1 - same for place in places])
        rest, where = ids[places, same : lengths[places[0]]], positions[..., places, same : lengths[places[0]]]
        with only_rows(some, last):
            states = language_model(
                inputs_embeds=embed(rest), position_ids=where, past_key_values=cache, **how
            ).last_hidden_state
        yield states[some.to(states.device), last.to(states.device)].unsqueeze(1), places


# ---- masks over a whole tree ----

#: Nodes of a tree with masks, which grow with their square.
MASKED_NODES = 2048


def _is_causal(config: Any, tree: Tree) -> bool:
    """Whether every node sees its whole path and nothing else: no image has a mask, and no path leaves a window."""
    window = config.sliding_window if "sliding_attention" in config.layer_types else None
    both_ways = len(tree.image_nodes) and _both_ways(config)
    return not both_ways and (not window or int(tree.positions.max()) < window)


def _both_ways(config: Any) -> frozenset[str]:
    """Returns the types of layers in which the tokens of an image see each other: of Gemma 4, at most one."""
    if config.model_type == "gemma3_text":
        return frozenset(config.layer_types)
    return frozenset(["sliding_attention"] if config.use_bidirectional_attention == "vision" else [])


def _masked(masks: Mapping[str, torch.Tensor], tree: Tree, device: torch.device) -> Branches:
    """Returns masks as blocks: nodes of different roots see nothing of each other, and stand behind each other."""
    roots = (tree.positions == 0).nonzero().flatten().tolist()
    spans = [slice(start, end) for start, end in zip(roots, [*roots[1:], len(tree.positions)], strict=True)]

    def blocks(mask: torch.Tensor) -> tuple[Block, ...]:
        return tuple(Block(span, span, mask[..., span, span].to(device, non_blocking=True)) for span in spans)

    full, windowed = masks["full_attention"], masks.get("sliding_attention")
    return Branches(blocks(full), in_windows=None if windowed is None else blocks(windowed))


def full_masks(config: Any, tree: Tree, rows: np.ndarray, image_id: int) -> dict[str, torch.Tensor]:
    """Says which nodes see which, for families that read images in both directions (Gemma).

    A node sees those on its path up to itself, and all of its own image; in layers with a window, no further::

        <s> I I red       1 . . .       Gemma 3: I and I see each other. Gemma 4: in layers with a window alone,
                          1 1 1 .       or, its small models, in none
                          1 1 1 .
                          1 1 1 1

    Args:
        config: The language model's.
        tree: On any device.
        rows: The prompts' ids, padded.
        image_id: The image token's id.

    Returns:
        Masks ``(1, 1, nodes, nodes)`` by the type of a layer.
    """
    nodes = len(tree.ids)
    causal, together = np.zeros((nodes, nodes), bool), np.zeros((nodes, nodes), bool)
    for path, ids in zip(tree.paths, rows, strict=True):
        causal[path[:, None], path[None]] |= np.tri(len(path), dtype=bool)
        is_image = ids[: len(path)] == image_id
        if is_image.any():
            run = np.cumsum(np.diff(is_image.astype(int), prepend=0) == 1)[is_image]
            own = path[is_image]
            together[own[:, None], own[None]] |= run[:, None] == run[None]
    both_ways = _both_ways(config)
    masks = {name: causal | together if name in both_ways else causal for name in config.layer_types}
    if "sliding_attention" in masks:
        depth = tree.positions.cpu().numpy()
        masks["sliding_attention"] = masks["sliding_attention"] & (depth[:, None] - depth[None] < config.sliding_window)
    return {name: torch.from_numpy(mask)[None, None] for name, mask in masks.items()}
