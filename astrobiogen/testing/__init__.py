"""The battery of checks that every operator passes, on the CPU, under Triton's interpreter, and on a GPU where there
is one.

A check takes the public function, its plain reference and a `Case` (see `astrobiogen.kernels.cases`) and raises
`AssertionError` with the op, case, dtype, and the measured and the allowed error. `check_battery` runs them all.

`emulate` runs anybody's Triton kernels, compiled, on the CPU.
"""

from astrobiogen.testing._battery import check_battery as check_battery
from astrobiogen.testing._compiler import check_fullgraph as check_fullgraph
from astrobiogen.testing._compiler import check_opcheck as check_opcheck
from astrobiogen.testing._derivatives import check_gradcheck as check_gradcheck
from astrobiogen.testing._derivatives import check_partial_gradients as check_partial_gradients
from astrobiogen.testing._derivatives import check_second_derivative as check_second_derivative
from astrobiogen.testing._habits import check_habits as check_habits
from astrobiogen.testing._nonfinite import check_nonfinite as check_nonfinite
from astrobiogen.testing._routes import Implementation as Implementation
from astrobiogen.testing._routes import route as route
from astrobiogen.testing._transforms import check_transforms as check_transforms
from astrobiogen.testing._values import check_op as check_op
from astrobiogen.testing._visibility import check_visibility as check_visibility
from astrobiogen.testing.ptx import emulate as emulate
