"""The catalogue of operators: every public function of `astrobiogen.kernels`, one line each."""

from astrobiogen.kernels.attention.op import attention as attention
from astrobiogen.kernels.conv_nd.norm import conv_nd_norm as conv_nd_norm
from astrobiogen.kernels.conv_nd.op import conv_nd as conv_nd
from astrobiogen.kernels.conv_nd.op import conv_transpose_nd as conv_transpose_nd
from astrobiogen.kernels.edge_attention.op import EdgeLists as EdgeLists
from astrobiogen.kernels.edge_attention.op import edge_attention as edge_attention
from astrobiogen.kernels.edge_attention.op import edge_lists as edge_lists
from astrobiogen.kernels.linear.op import linear as linear
from astrobiogen.kernels.linear_cross_entropy.op import linear_cross_entropy as linear_cross_entropy
from astrobiogen.kernels.rms_norm.op import add_rms_norm as add_rms_norm
from astrobiogen.kernels.rms_norm.op import rms_norm as rms_norm
from astrobiogen.kernels.rope.frequencies import rope_frequencies as rope_frequencies
from astrobiogen.kernels.rope.frequencies import rope_frequencies_dynamic_ntk as rope_frequencies_dynamic_ntk
from astrobiogen.kernels.rope.frequencies import rope_frequencies_linear as rope_frequencies_linear
from astrobiogen.kernels.rope.frequencies import rope_frequencies_llama3 as rope_frequencies_llama3
from astrobiogen.kernels.rope.frequencies import rope_frequencies_yarn as rope_frequencies_yarn
from astrobiogen.kernels.rope.frequencies import rope_gather as rope_gather
from astrobiogen.kernels.rope.frequencies import rope_positions as rope_positions
from astrobiogen.kernels.rope.op import rope as rope
from astrobiogen.kernels.swiglu.op import swiglu as swiglu
from astrobiogen.kernels.swiglu.op import swiglu_packed as swiglu_packed
from astrobiogen.kernels.swiglu_mlp.op import swiglu_mlp as swiglu_mlp
