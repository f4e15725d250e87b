"""The published DynFocus connector in plain PyTorch, the reference for values and speed of the JAX one.

An independent program in the style of the published code: weighted k-means by broadcast differences and a
loop over clusters, DPC-KNN by `torch.cdist`, a loop over the groups of every frame in the two-level merger,
and a loop over the frames that assembles the tokens. Parameters have the published names.

It computes the mode `released` of this project, with three sources of randomness removed: equal densities are
ordered by index instead of by random noise, an empty k-means cluster keeps its centroid instead of taking a
random frame, and the perturbation noise is an argument.

T frames, N patches, C vision width, D language width, P pooled tokens, K event prototypes, J selected ones,
M spatial prototypes (M1 and M2 by level), Q text queries, S noise samples.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dpc_knn(features: Tensor, num_clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks with k nearest neighbours (paper, Sec. 3.2); prototypes are unweighted means.

    Args:
      features: [B, N, C], any float dtype; distances are computed in float32.
      num_clusters: K.
      k: number of neighbours.

    Returns:
      Prototypes [B, K, C], and the cluster of each point, int64 [B, N], numbered by descending importance.
    """
    batch, points, width = features.shape
    with torch.no_grad():
        x = features.float()
        distance = torch.cdist(x, x) / width**0.5  # [B, N, N]
        nearest = distance.topk(k, dim=-1, largest=False).values
        density = (-nearest.square().mean(-1)).exp()  # [B, N]

        here, there = density[:, :, None], density[:, None, :]
        index = torch.arange(points, device=x.device)
        denser = (there > here) | ((there == here) & (index[None, :] < index[:, None]))  # ties by index
        farthest = distance.flatten(1).amax(1)[:, None, None]
        indicator = torch.where(denser, distance, farthest).amin(-1)  # [B, N]

        centers = _largest(density * indicator, num_clusters)  # [B, K]
        to_centers = distance.gather(1, centers[:, :, None].expand(-1, -1, points))  # [B, K, N]
        assignment = to_centers.argmin(1)
        ranks = torch.arange(num_clusters, device=x.device).expand(batch, -1)
        assignment = assignment.scatter(1, centers, ranks)  # a centre is in its own cluster

    flat = (assignment + num_clusters * torch.arange(batch, device=x.device)[:, None]).flatten()
    count = features.new_zeros(batch * num_clusters, 1)
    count = count.index_add(0, flat, features.new_ones(batch * points, 1)) + 1e-6
    total = features.new_zeros(batch * num_clusters, width)
    total = total.index_add(0, flat, features.reshape(-1, width))
    return (total / count).view(batch, num_clusters, width), assignment


def _largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values of the last axis, descending; ties by index."""
    return values.argsort(dim=-1, descending=True, stable=True)[..., :k]


@torch.no_grad()
def weighted_kmeans(
    features: Tensor,
    initial: Tensor,
    weights: Tensor | None = None,
    *,
    iterations: int = 10,
    tol: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Euclidean Lloyd iterations from given points.

    The loop ends at an update that moves the centroids by less than `tol` in total. That update is dropped,
    as in the published code.

    Args:
      features: [N, D].
      initial: int64 [K], indices of the points to start from.
      weights: [N]; None means 1 for all points.
      iterations: largest number of updates.
      tol: tolerance of the sum of all centroids' movements.

    Returns:
      Centroids [K, D], the cluster of each point, int64 [N], and the summed weights of each cluster [K].
    """
    weights = features.new_ones(len(features)) if weights is None else weights
    centroids = features[initial]
    for _ in range(iterations):
        distance = (features[:, None] - centroids[None]).square().sum(-1).sqrt()  # [N, K] by way of [N, K, D]
        labels = distance.argmin(1)
        updated = centroids.clone()
        mass = features.new_zeros(len(centroids))
        for i in range(len(centroids)):
            members = labels == i
            mass[i] = weights[members].sum()
            if mass[i] > 0:
                updated[i] = (weights[members, None] * features[members]).sum(0) / mass[i]
        moved = torch.linalg.vector_norm(updated - centroids, dim=1).sum()
        if moved < tol:
            break
        centroids = updated
    return centroids, labels, mass


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Return one-hot rows [..., k, N] of the k largest scores [..., N], in ascending order of index."""
    indices = _largest(scores, k).sort(-1).values
    return F.one_hot(indices, scores.shape[-1]).to(scores.dtype)


class PerturbedTopK(torch.autograd.Function):
    """Mean of `hard_topk` over Gaussian perturbations; the gradient uses the diagonal of the Jacobian.

    `PerturbedTopK.apply(scores [B, N], noise [B, S, N], k, sigma) -> [B, k, N]`

    Source: Berthet et al. 2020.
    """

    @staticmethod
    def forward(ctx, scores, noise, k, sigma):
        indicators = hard_topk(scores[:, None] + sigma * noise, k)  # [B, S, k, N]
        ctx.save_for_backward(indicators, noise)
        ctx.sigma = sigma
        return indicators.mean(1)

    @staticmethod
    def backward(ctx, grad):
        indicators, noise = ctx.saved_tensors
        if ctx.sigma <= 1e-20:
            return torch.zeros_like(noise[:, 0]), None, None, None
        diagonal = torch.einsum("bskn,bsn->bkn", indicators, noise) / (noise.shape[1] * ctx.sigma)
        return torch.einsum("bkn,bkn->bn", grad, diagonal), None, None, None


class ScoreNetwork(nn.Module):
    """Score of every prototype from its pooled features and the mean over all: [B, K, 2C] -> [B, K, 1]."""

    def __init__(self, width: int):
        super().__init__()
        double = 2 * width
        self.in_conv = nn.Sequential(nn.LayerNorm(double), nn.Linear(double, double), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(double, width),
            nn.GELU(),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, 1),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        own, shared = self.in_conv(inputs).chunk(2, dim=-1)
        return self.out_conv(torch.cat([own, shared.mean(1, keepdim=True).expand_as(own)], dim=-1))


class Selection(nn.Module):
    """Selection of the J best event prototypes, with the spatial tokens of their key frames."""

    def __init__(self, width: int, ratio: float, sigma: float):
        super().__init__()
        self.score_network = ScoreNetwork(width)
        self.ratio, self.sigma = ratio, sigma

    def scores(self, events: Tensor) -> Tensor:
        """Return scores [K] in [0, 1] of the event prototypes [K, P, C]."""
        pooled = torch.cat([events.mean(1), events.amax(1)], dim=-1)
        scores = self.score_network(pooled[None])[0, :, 0]
        return (scores - scores.min()) / (scores.max() - scores.min() + 1e-5)

    def forward(self, events: Tensor, spatial: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select J = ceil(ratio K) prototypes.

        Args:
          events: [K, P, C]. spatial: [K, M, C], spatial prototypes of the key frames. noise: [S, K],
          standard normal, for the differentiable selection of training. None selects the largest
            scores, as in evaluation.

        Returns:
          Tokens [J, P + M, C], and the prototype of each slot, int64 [J]. In training, two slots may have the
          same prototype.
        """
        scores = self.scores(events)
        kept = math.ceil(self.ratio * len(events))
        if noise is None:
            indices = _largest(scores, kept).sort().values
            return torch.cat([events[indices], spatial[indices]], dim=1), indices
        indicators = PerturbedTopK.apply(scores[None], noise[None], kept, self.sigma)[0]  # [J, K]
        event_tokens = torch.einsum("jk,kpc->jpc", indicators, events)
        spatial_tokens = torch.einsum("jk,kmc->jmc", indicators.detach(), spatial)
        return torch.cat([event_tokens, spatial_tokens], dim=1), indicators.argmax(-1)


class Merger(nn.Module):
    """Two levels of DPC-KNN over the patches of each frame, grouped by the second level and gated."""

    def __init__(self, prototypes: tuple[int, int], neighbours: tuple[int, int]):
        super().__init__()
        self.prototypes, self.neighbours = prototypes, neighbours
        self.score = nn.Linear(prototypes[1], prototypes[1])

    def forward(self, features: Tensor) -> Tensor:
        """Return [T, M1 + M2, C] of patches [T, N, C]: each level-2 prototype, then its level-1 members."""
        fine, _ = dpc_knn(features, self.prototypes[0], self.neighbours[0])  # [T, M1, C]
        coarse, parents = dpc_knn(fine, self.prototypes[1], self.neighbours[1])  # [T, M2, C], [T, M1]
        gates = self.score(coarse.mean(-1)).softmax(-1)  # [T, M2]
        frames = []
        for t in range(len(features)):
            groups = []
            for i in range(self.prototypes[1]):
                members = fine[t, parents[t] == i]
                groups.append(gates[t, i] * torch.cat([coarse[t, i : i + 1], members]))
            frames.append(torch.cat(groups))
        return torch.stack(frames)


class PublishedConnector(nn.Module):
    """Connector from frame features and text queries of one video to language tokens (paper, 3.2 and 3.3).

    Args:
      vision_width: C.
      language_width: D.
      clusters: largest number of event prototypes, K.
      ratio: retention ratio of the prototypes.
      pooled_side: side of the pooled patch grid; P is its square.
      spatial_prototypes: M of both levels.
      neighbours: k of both levels.
      sigma: scale of the perturbation.
    """

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        *,
        clusters: int = 80,
        ratio: float = 0.45,
        pooled_side: int = 4,
        spatial_prototypes: tuple[int, int] = (16, 6),
        neighbours: tuple[int, int] = (8, 3),
        sigma: float = 0.1,
    ):
        super().__init__()
        self.clusters, self.pooled_side = clusters, pooled_side
        self.mm_projector = nn.Sequential(
            nn.Linear(vision_width, language_width), nn.GELU(), nn.Linear(language_width, language_width)
        )
        self.vlm_att_key_projector = nn.Linear(vision_width, vision_width)
        self.vlm_att_val_projector = nn.Linear(vision_width, language_width)
        self.selective = Selection(vision_width, ratio, sigma)
        self.merge = Merger(spatial_prototypes, neighbours)

    def forward(
        self,
        features: Tensor,
        text_queries: Tensor,
        initial: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens [L, D] of a video, its frames in time order.

        Args:
          features: [T, N, C], N a square number.
          text_queries: [T, Q, C].
          initial: int64 [clusters], initial frames of k-means, which runs if T > clusters. None draws them.
          noise: [S, K] for the selection of training; None in evaluation.
        """
        spatial = self.spatial_prototypes(features)
        events, key_frames = self.event_prototypes(self.pool(features), initial)
        cones, chosen = self.selective(events, spatial[key_frames], noise)
        return self.encode(cones, key_frames[chosen], spatial, text_queries)

    def spatial_prototypes(self, features: Tensor) -> Tensor:
        """Return the spatial prototypes [T, M1 + M2, C] of features [T, N, C]."""
        return self.merge(features)

    def pool(self, features: Tensor) -> Tensor:
        """Average-pool the square patch grid of features [T, N, C] to [T, P, C]."""
        grid = features.transpose(1, 2).unflatten(2, (math.isqrt(features.shape[1]), -1))
        return F.adaptive_avg_pool2d(grid, self.pooled_side).flatten(2).transpose(1, 2)

    def event_prototypes(self, pooled: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cluster pooled frames [T, P, C] by k-means; return prototypes [K, P, C] and key frames, int64 [K].

        If there are no more than `clusters` frames, each is a prototype. A cluster's key frame is its initial
        frame.
        """
        frames = len(pooled)
        if frames <= self.clusters:
            return pooled, torch.arange(frames, device=pooled.device)
        if initial is None:
            initial = torch.randperm(frames, device=pooled.device)[: self.clusters]
        centroids, _, _ = weighted_kmeans(pooled.flatten(1), initial)
        return centroids.unflatten(1, pooled.shape[1:]), initial

    def rods(self, spatial: Tensor, text_queries: Tensor) -> Tensor:
        """Return two tokens per frame, [content, context]: [T, M, C] and [T, Q, C] -> [T, 2, D]."""
        content = self.mm_projector(spatial.mean(1))
        keys = self.vlm_att_key_projector(spatial)
        attention = (text_queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5).softmax(-1)  # [T, Q, M]
        context = self.vlm_att_val_projector((attention @ spatial).mean(1))
        return torch.stack([content, context], dim=1)

    def encode(self, cones: Tensor, cone_frames: Tensor, spatial: Tensor, text_queries: Tensor) -> Tensor:
        """Return the tokens [L, D]: cones [J, P + M, C] of cone_frames, int64 [J], and rods of the others.

        If every frame has a cone, as in a single image, every frame also has rods, before its cone. A frame
        that training selected for several slots uses the first of them.
        """
        frames = len(spatial)
        slots = {}
        for slot, frame in enumerate(cone_frames.tolist()):
            slots.setdefault(frame, slot)
        all_cones = len(slots) == frames
        rod_frames = [t for t in range(frames) if all_cones or t not in slots]

        cone_tokens = self.mm_projector(cones)  # [J, P + M, D]
        rod_tokens = dict(
            zip(rod_frames, self.rods(spatial[rod_frames], text_queries[rod_frames]), strict=True)
        )
        sequence = []
        for t in range(frames):
            if t in rod_tokens:
                sequence.append(rod_tokens[t])
            if t in slots:
                sequence.append(cone_tokens[slots[t]])
        return torch.cat(sequence)
