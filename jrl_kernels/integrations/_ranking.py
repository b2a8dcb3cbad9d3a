"""The mathematics of sentence-transformers' in-batch losses, over embeddings that are unit rows where cosines are meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, info_nce
from ._softmax import common_dtype, log_sum_exp, row_dots, same_rows


class Ranking(NamedTuple):
    """What a ranking loss is made of, in sentence-transformers' words."""

    scale: float | Tensor
    directions: Sequence[str]  # of query_to_doc, query_to_query, doc_to_query, doc_to_doc
    partition: str  # "joint" or "per_direction"
    hardness: str | None  # "in_batch_negatives", "hard_negatives" or "all_negatives"
    strength: float


def ranking_loss(local: list[Tensor], columns: list[Tensor], first: int, settings: Ranking) -> Tensor:
    """The mean over this rank's queries of log Z - s_positive.

    Args:
        local: this rank's queries and positives, [b, D] each.
        columns: queries, positives and one matrix for each hard negative, [N, D] each, of all ranks; row i belongs to query i.
        first: the row of `columns` that this rank's first query is.
        settings: whose directions decide what Z sums over.

    Raises:
        ValueError: queries and positives of different numbers.
    """
    same_rows("MultipleNegativesRankingLoss", "queries", local[0], "positives", local[1])
    width = len(columns)
    query, positive, *columns = common_dtype(*local, *columns)
    queries, documents = columns[0], torch.cat(columns[1:])
    total, device = queries.shape[0], query.device
    own = torch.arange(query.shape[0], device=device) + first
    everyone = torch.arange(total, device=device)
    group = everyone.repeat(width - 1)  # the query that a document belongs to
    scale, wanted = settings.scale, set(settings.directions)
    symmetric = settings.partition == "per_direction" and wanted == {"query_to_doc", "doc_to_query"}
    if symmetric and settings.hardness is None and width == 2 and total == query.shape[0]:
        loss: Tensor = info_nce(query, positive, scale=scale)  # CLIP's, in one sweep
        return loss
    dots = row_dots(query, positive)

    if settings.hardness is None:
        keys, ids = documents, torch.full_like(group, -1)
        if "query_to_query" in wanted:
            keys, ids = torch.cat([documents, queries]), torch.cat([ids, everyone])
        exclude = (own, ids) if "query_to_query" in wanted else None
        terms = [log_sum_exp(query, keys, own, scale=scale, exclude=exclude, member_dots=dots)]
    else:
        terms = _hard_terms(query, queries, documents, columns[2:], own, group, dots, settings)

    of_documents = []
    if "doc_to_query" in wanted:
        keys, ids, member = queries, torch.full_like(everyone, -1), own
        if "doc_to_doc" in wanted:
            keys, ids = torch.cat([queries, documents]), torch.cat([ids, group])
        exclude = (own, ids) if "doc_to_doc" in wanted else None
        of_documents.append(
            log_sum_exp(positive, keys, member, scale=scale, exclude=exclude, member_dots=dots)
        )
    elif "doc_to_doc" in wanted and total > 1:
        of_documents.append(
            log_sum_exp(positive, documents, (own + 1) % total, scale=scale, exclude=(own, group))
        )

    if settings.partition == "joint":
        log_z = torch.stack([*terms, *of_documents], 1).logsumexp(1)
    else:
        log_z = (torch.stack(terms, 1).logsumexp(1) + sum(of_documents)) / len(wanted)
    return (log_z - scale * dots).mean()


def _hard_terms(
    query: Tensor,
    queries: Tensor,
    documents: Tensor,
    negatives: list[Tensor],
    own: Tensor,
    group: Tensor,
    dots: Tensor,
    settings: Ranking,
) -> list[Tensor]:
    """Parts of log Z of the queries' rows where some negatives weigh more: [b] each.

    A penalised logit is scale q.d + strength stopgrad(q.d): the product of [q, strength/scale stopgrad(q)] with [d, stopgrad(d)].
    A query's own documents, of which some are penalised and some not, leave the sweep and are added one by one.
    """
    scale, strength, total = settings.scale, settings.strength, queries.shape[0]
    terms = [scale * dots]
    for negative in negatives:
        similarity = row_dots(query, negative[own])
        logit = scale * similarity
        if settings.hardness != "in_batch_negatives":
            logit = logit + strength * similarity.detach()
        terms.append(logit)
    if total == 1:
        return terms
    keys, ids = documents, group
    if settings.hardness != "hard_negatives":
        query = torch.cat([query, query.detach() * (strength / scale)], 1)
        keys = torch.cat([documents, documents.detach()], 1)
    if "query_to_query" in settings.directions:
        unpenalised = F.pad(queries, (0, keys.shape[1] - queries.shape[1]))
        keys = torch.cat([keys, unpenalised])
        ids = torch.cat([ids, torch.arange(total, device=ids.device)])
    terms.append(log_sum_exp(query, keys, (own + 1) % total, scale=scale, exclude=(own, ids)))
    return terms


def guided_loss(
    columns: list[Tensor],
    guides: list[Tensor],
    *,
    first: int,
    temperature: float,
    margin: tuple[float, float],
    anchors: bool,
    positives: bool,
    rows: int,
    with_backward: bool,
) -> Tensor:
    """GISTEmbed: InfoNCE without the pairs that a guide finds more similar than its positive less a margin.

    Args:
        columns: this rank's anchors [b, D], then positives and hard negatives of all ranks [N, D]; unit rows.
        guides: the guide's embeddings of the same, of a width of its own.
        first: the row of the positives that belongs to this rank's first anchor.
        temperature: divides the cosines.
        margin: absolute, and relative to the guide's similarity of the positive.
        anchors, positives: whether anchors contrast with anchors, positives with positives.
        rows: of anchors at a time.
        with_backward: also propagate back, rows by rows.

    Returns:
        The 0-d loss, detached where it was propagated back.
    """
    wide = _checks.accumulation(columns[0].dtype)
    count = columns[0].shape[0]
    leaves = [c.detach().requires_grad_(c.requires_grad) for c in columns] if with_backward else columns
    losses = []
    # thresholds and cosines in float32, as the host's: the products are not for autocast to round
    with torch.autocast(columns[0].device.type, enabled=False):
        wide_guides = [guide.to(wide) for guide in guides]
        for begin in range(0, count, rows):
            here = slice(begin, min(begin + rows, count))
            loss = _guided_rows(
                [leaf.to(wide) for leaf in leaves], wide_guides, here, first, temperature, margin, anchors, positives
            ) / count  # fmt: skip
            if with_backward:
                loss.backward()
                loss = loss.detach()
            losses.append(loss)
    if with_backward:
        found = [(c, leaf.grad) for c, leaf in zip(columns, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([c for c, _ in found], [g for _, g in found])
    return torch.stack(losses).sum()


def _guided_rows(
    columns: list[Tensor],
    guides: list[Tensor],
    here: slice,
    first: int,
    temperature: float,
    margin: tuple[float, float],
    anchors: bool,
    positives: bool,
) -> Tensor:
    """The sum of the losses of the anchors `here`."""
    own = torch.arange(here.start, here.stop, device=columns[0].device) + first
    here_rows = torch.arange(own.shape[0], device=own.device)
    # from the product that it is compared with: a copy of the positive is then exactly as alike, and on the host's side of it
    alike = guides[0][here] @ guides[1].T
    likeness = alike[here_rows, own][:, None]
    threshold = likeness - margin[0] - likeness.abs() * margin[1]

    def sifted(rows: tuple[Tensor, Tensor], keys: int, alike: Tensor | None = None) -> Tensor:
        mask = (rows[1] @ guides[keys].T if alike is None else alike) > threshold
        if alike is not None:
            mask[here_rows, own] = False
        return (rows[0] @ columns[keys].T).masked_fill(mask, -torch.inf)

    anchor = columns[0][here], guides[0][here]
    scores = [sifted(anchor, 1, alike)]
    if anchors:
        scores.append(sifted(anchor, 0))
    if positives:
        scores.append(sifted((columns[1][own], guides[1][own]), 1))
    scores += [sifted(anchor, column) for column in range(2, len(columns))]
    return F.cross_entropy(torch.cat(scores, 1) / temperature, own, reduction="sum")
