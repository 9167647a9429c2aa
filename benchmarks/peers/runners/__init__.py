"""One small runner per program. `worker` loads them by path in the program's own environment, where flux_quant may be
missing: they import their program inside functions and nothing of ours, `ours` aside.

A runner has a function for each kind of work that its program can do:

    linear(given, how, device, dtype) -> (call, bytes)
                            given["weight"] (N, K) float32 or, for GGUF, the parts given["packed"][how]
                            -> a layer x (M, K) -> (M, N), bytes of its weight
    step(task) -> call      one evaluation of the transformer in the file task["model"] on noise from task["seed"]
                            -> `velocity` (1, tokens, 64) float32, or the `picture` that became of its latents
    convert(task) -> call   writes the file task["target"] in task["format"] from task["source"]

What is made before `call` is not timed. An exception says why the program cannot do it.
"""
