"""What a codec loses of real gradients, as a worker measures it."""

import pytest
import torch

from raytrain_het.allreduce.codecs import RESIDUAL, Stamp, codec_of
from raytrain_het.allreduce.compression_error import EVERY_STEPS, CompressionErrorMeter


def test_one_shard_is_looked_at_in_every_twentieth_step_of_another_bucket_each_time():
    meter = CompressionErrorMeter()
    due = [(step, bucket) for step in range(4 * EVERY_STEPS) for bucket in range(3) if meter.is_due(step, bucket, 3)]
    assert due == [(0, 0), (EVERY_STEPS, 1), (2 * EVERY_STEPS, 2), (3 * EVERY_STEPS, 0)]


@pytest.mark.parametrize("word", ["int8", "topk(density=0.1)"])
def test_the_error_is_that_of_what_was_to_be_sent_with_what_was_left_out_before(word):
    codec, meter, weight = codec_of(word), CompressionErrorMeter(), 3.0
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    state, following = (codec.init(5000, x.dtype, x.device) for _ in range(2))
    if RESIDUAL in state:
        state[RESIDUAL].copy_(0.2 * x.flip(0))
    y = x + weight * state[RESIDUAL] if state else x
    payload = torch.empty(codec.capacity_bytes(5000, x.dtype), dtype=torch.uint8)
    codec.encode(x.clone(), payload, Stamp(1, 2, weight), state, following)
    residual = following[RESIDUAL] * weight if following else None
    meter.measure(20, word, codec, payload, shard=x, residual=residual)
    out = torch.empty(5000)
    codec.decode(payload, out)
    ((told, error),) = meter.take()
    assert told == word
    assert error == pytest.approx(float((y - out).norm() / y.norm()), rel=1e-4)
    assert meter.take() == [] and not meter.is_due(20, 20 // EVERY_STEPS % 2, 2)
