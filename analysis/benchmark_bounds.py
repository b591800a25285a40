"""What bounds the rows that miss their bars: the table says so where they do, the record always.

From counts of operations, and from profiles. Rows that are not here have met their bars so far.
"""

MANY = "some 1,400 short operations and their Python beside 1 ms; the systems take a tenth"
VMAPPED = "vmapped, as by torch.func;"

BOUNDS = {
    "mnist-64/hooks": "two hooks in Python beside a pass of 1 ms; the quartiles hold the bar",
    "mnist-64/activations": "a hook and 3 short operations a layer, some 40 µs, beside 1 ms",
    "conv-64/activations": "every output is read once more, 12 MB; as many short operations again",
    "mnist-64/keep": "hooks in Python, some 20 µs a layer, beside 1 ms; no further operation",
    "mnist-64/d-sign": "some 230 short operations and their Python, 7 µs each, beside 1 ms",
    "conv-64/d-sign": "a second backward pass, without weights; cases copied and averaged",
    "mnist-64/d-exact": "some 240 short operations and their Python, 8 µs each, beside 1 ms",
    "mnist-64/all-exact": MANY,
    "mnist-64/all-sign": MANY,
    "mnist-64/natural-exact": MANY,
    "mnist-64/natural-sign": MANY,
    "mnist-512/natural-all": "arithmetic: Cholesky factors and second moments take a third each",
    "conv-64/natural-joint": "each sample's gradients and products of them; a second backward pass",
    "training/every-50th": "one measurement takes 9 to 12 plain steps, a fifth of 50 steps",
    "long-training/overhead": "idle hooks, some 1 %, count as training; the rest is not known",
    "mnist-64/natural-asdl-mc": MANY,
    "mnist-64/per-sample": f"{VMAPPED} BackPACK forms all outer products of a layer at once",
    "conv-64/per-sample": f"{VMAPPED} the fastest rival: it cannot be much faster than that",
}
