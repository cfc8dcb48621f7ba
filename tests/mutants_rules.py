"""Faults of Adam and SGD, in C++, in Triton and in the specification."""

from mutants import planted, tests_of

OF_CPU = tests_of("adam", "sgd", k="cpu-cpu")
OF_TRITON = tests_of("adam", "sgd", k="triton-cpu")
OF_REFERENCE = tests_of("adam", "sgd", k="reference-cpu")

RULES = [
    *planted(
        "csrc/math/adam.h",
        OF_CPU,
        {
            "Adam: the penalty is a decay, too": ("without_decay.weight_decay = 0.0;", ""),
            "Adam: the penalty is scaled with the gradient": (
                "penalized(s.coefficient * grad, s.penalty, param)",
                "penalized(s.coefficient * grad, s.coefficient * s.penalty, param)",
            ),
        },
    ),
    *planted(
        "csrc/math/rule.h",
        OF_CPU,
        {
            "L2 penalty: none is a product with 0": (
                "penalty != T(0) ? grad + penalty * param : grad",
                "grad + penalty * param",
            ),
        },
    ),
    *planted(
        "csrc/math/sgd.h",
        OF_CPU,
        {
            "SGD: dampening from the first step on": ("is_first ? 1.0 : 1.0 - s.dampening", "1.0 - s.dampening"),
            "SGD: no dampening": ("is_first ? 1.0 : 1.0 - s.dampening", "1.0"),
            "SGD: maximize ignored": (
                "s.maximize != 0.0 ? -grad_coefficient",
                "s.maximize != 0.0 ? grad_coefficient",
            ),
            "SGD: nesterov without the gradient": ("? g + s.look_ahead * b : b", "? s.look_ahead * b : b"),
            "SGD: nesterov's loop is the other one": (
                "return function(Formula<true, Nesterov::yes>{})",
                "return function(Formula<true, Nesterov::no>{})",
            ),
            "SGD: always nesterov": ("s.nesterov != 0.0 ? s.momentum : 0.0", "s.momentum"),
            "SGD: the buffer is not stored": ("state[kMomentumBuffer] = b;", ""),
        },
    ),
    *planted(
        "triton_kernels/adam.py",
        OF_TRITON,
        {
            "Triton: Adam: the penalty is a decay, too": (
                "    tl.store(out + 0, 1.0)  # what AdamW's decay leaves\n",
                "",
            ),
            "Triton: Adam: gradients are not scaled": ("penalized(coefficient * grad,", "penalized(grad,"),
        },
    ),
    *planted(
        "triton_kernels/_common.py",
        OF_TRITON,
        {
            "Triton: L2 penalty: none is a product with 0": (
                "tl.where(penalty != 0.0, grad + penalty * param, grad)",
                "grad + penalty * param",
            ),
        },
    ),
    *planted(
        "triton_kernels/sgd.py",
        OF_TRITON,
        {
            "Triton: SGD: dampening from the first step on": (
                "tl.where(step == 1.0, 1.0, 1.0 - ",
                "tl.where(step == 0.0, 1.0, 1.0 - ",
            ),
            "Triton: SGD: the buffer of the first step is kept": (
                "tl.where(step == 1.0, 0.0, momentum)",
                "tl.where(step == 1.0, 1.0, 0.5 * momentum)",
            ),
            "Triton: SGD: always nesterov": (
                "tl.where(look_ahead != 0.0, grad + look_ahead * momentum_buffer, momentum_buffer)",
                "grad + look_ahead * momentum_buffer",
            ),
            "Triton: SGD: maximize ignored": (
                "!= 0.0, -coefficient, coefficient",
                "!= 0.0, coefficient, coefficient",
            ),
        },
    ),
    *planted(
        "trainops/reference.py",
        OF_REFERENCE,
        {
            "reference: no penalty is a product with 0": (
                "return g if float(weight_decay) == 0.0 else g + ",
                "return g + ",
            ),
            "reference: SGD: dampening from the first step on": ("torch.where(is_first, g, later)", "later"),
        },
    ),
    *planted(
        "trainops/sgd.py",
        tests_of("sgd", k="cpu-cpu or reference-cpu or not target"),
        {
            "SGD: a buffer of PyTorch's class waits for its first step": (
                "torch.ones((), dtype",
                "torch.zeros((), dtype",
            ),
            "SGD: momentum cannot begin later": (
                "if not state or any(state.get(name) is None and codes_key(name) not in state for name in names):",
                "if not state:",
            ),
            "SGD: sparse gradients are refused": ("takes_sparse = True", "takes_sparse = False"),
        },
    ),
    *planted(
        "trainops/adam.py",
        tests_of("adam", k="cpu-cpu or reference-cpu or not target"),
        {
            "Adam: groups that disagree on their decay": (
                "if len(set(map(_is_decoupled, groups))) > 1:",
                "if False:",
            ),
            "Adam: decoupled decay is a penalty": (
                'return "adamw" if self.param_groups and',
                'return "adamw" if False and',
            ),
        },
    ),
]
