"""The reducer of a bucket whose members all send for themselves, wherever they are."""

from __future__ import annotations

from raytrain_het.allreduce.codecs import Codec
from raytrain_het.allreduce.layout import Bucket
from raytrain_het.allreduce.reducers.all_gather import AllGatherReducer
from raytrain_het.allreduce.reducers.generation_group import GenerationGroup
from raytrain_het.allreduce.reducers.gradient_coder import GradientCoder
from raytrain_het.allreduce.reducers.owner_shards import OwnerShardsReducer


def flat_kind(codec: Codec) -> type[AllGatherReducer] | type[OwnerShardsReducer]:
    """The kind of reducer for what travels in this codec."""
    return AllGatherReducer if codec.all_gather else OwnerShardsReducer


def flat_reducer(
    members: GenerationGroup, bucket: Bucket, coder: GradientCoder
) -> AllGatherReducer | OwnerShardsReducer:
    """The bucket's reducer among these members."""
    return flat_kind(coder.codec(members.rank, bucket))(members, bucket, coder)
