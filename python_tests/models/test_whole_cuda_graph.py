"""A whole model captured in a CUDA graph, where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from every_method import METHODS

from pelt_kernels.models import get_pelt_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "unipelt"])
def test_a_replay_reads_the_batch_that_is_there_then(method, make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), METHODS[method]), std=0.05).cuda().eval()
    first, second = (
        make_batch(lengths, width=9, with_labels=False) for lengths in ((9, 4), (3, 8))
    )
    given = {name: value.cuda() for name, value in first.items()}
    with torch.no_grad():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # whatever is made at a first call is there before
            for _ in range(2):
                model(**given)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**given).logits
        for batch in (second, first):
            for name, value in batch.items():
                given[name].copy_(value)
            graph.replay()
            expected = model(**{name: value.cuda() for name, value in batch.items()}).logits
            torch.testing.assert_close(captured, expected)
