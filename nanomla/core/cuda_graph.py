"""A step recorded once as a CUDA graph and replayed from then on, without Python in between."""

from collections.abc import Callable

import torch


class GraphedStep:
    """
    Call `run()`, which takes nothing and works on tensors that stay where they are.

    The first `warmup` calls run it on a side stream, where it compiles and allocates; the next one
    records it; all later ones replay the recording and return what the recorded call returned
    (the same tensors, with new values). A stream may be shared: cuBLAS keeps 32 MiB for each one.
    """

    def __init__(self, run: Callable, warmup: int = 1, stream: torch.cuda.Stream | None = None):
        self.run, self.warmup = run, warmup
        self.stream = stream or torch.cuda.Stream()
        self.calls, self.graph, self.result = 0, None, None

    def __call__(self):
        self.calls += 1
        if self.calls <= self.warmup:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.run()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.run()
        self.graph.replay()
        return self.result
