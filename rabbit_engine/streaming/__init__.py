"""Streams weights: disk -> host memory -> ring -> parameter, and releases them again."""

from rabbit_engine.streaming.binding.binding import Binding
from rabbit_engine.streaming.binding.blocks import Borrow, LinearBlocks, RowBlock
from rabbit_engine.streaming.binding.bound import BoundUnit, ResidentUnit, WeightRef, weight_refs
from rabbit_engine.streaming.binding.linears import join_rows
from rabbit_engine.streaming.binding.packed import PackedWeight, multiplies_packed
from rabbit_engine.streaming.binding.passes import guard
from rabbit_engine.streaming.binding.placeholder import ExpertsPlaceholder, Placeholder, Placeholders
from rabbit_engine.streaming.binding.routed import RoutedExperts, adapts_routed, route
from rabbit_engine.streaming.binding.rows import EmbeddingRows
from rabbit_engine.streaming.binding.scratch import Scratch
from rabbit_engine.streaming.binding.tied import TiedRows
from rabbit_engine.streaming.binding.unit_weights import UnitWeights
from rabbit_engine.streaming.binding.wrapping import move
from rabbit_engine.streaming.caches.layers import LayerStates
from rabbit_engine.streaming.caches.states import BLOCK_TOKENS, PIECE_TOKENS, BlockHome, TextStates
from rabbit_engine.streaming.scheduler import Fiber, RandomStream, Scheduler, fiber_on, share_products
from rabbit_engine.streaming.stages.remote import RemoteLayers, tell_what_is_shown
from rabbit_engine.streaming.stages.runner import StageRunner
from rabbit_engine.streaming.stages.stage import ActiveAdapters, OpenStage, StageAnswer, StageRequest
from rabbit_engine.streaming.telemetry.profile import ExpertsProfile, Profile, UnitProfile
from rabbit_engine.streaming.telemetry.progress import PassProgress
from rabbit_engine.streaming.telemetry.speculation import SpeculationProfile
from rabbit_engine.streaming.telemetry.trace import Span, Trace, busy_share, write_chrome_trace
from rabbit_engine.streaming.transfer.claim import claim_ring
from rabbit_engine.streaming.transfer.entry import HostPlace
from rabbit_engine.streaming.transfer.experts import ExpertCache, ExpertSlots
from rabbit_engine.streaming.transfer.ring import STAGING_BYTES, Ring, fill_all
from rabbit_engine.streaming.transfer.slots import ExpertLayer
from rabbit_engine.streaming.transfer.transfer import Transfer
from rabbit_engine.streaming.transfer.unit import Unit, make_unit, row_blocks

__all__ = [
    "BLOCK_TOKENS",
    "PIECE_TOKENS",
    "STAGING_BYTES",
    "ActiveAdapters",
    "Binding",
    "BlockHome",
    "Borrow",
    "BoundUnit",
    "EmbeddingRows",
    "ExpertCache",
    "ExpertLayer",
    "ExpertSlots",
    "ExpertsPlaceholder",
    "ExpertsProfile",
    "Fiber",
    "HostPlace",
    "LayerStates",
    "LinearBlocks",
    "OpenStage",
    "PackedWeight",
    "PassProgress",
    "Placeholder",
    "Placeholders",
    "Profile",
    "RandomStream",
    "RemoteLayers",
    "ResidentUnit",
    "Ring",
    "RoutedExperts",
    "RowBlock",
    "Scheduler",
    "Scratch",
    "Span",
    "SpeculationProfile",
    "StageAnswer",
    "StageRequest",
    "StageRunner",
    "TextStates",
    "TiedRows",
    "Trace",
    "Transfer",
    "Unit",
    "UnitProfile",
    "UnitWeights",
    "WeightRef",
    "adapts_routed",
    "busy_share",
    "claim_ring",
    "fiber_on",
    "fill_all",
    "guard",
    "join_rows",
    "make_unit",
    "move",
    "multiplies_packed",
    "route",
    "row_blocks",
    "share_products",
    "tell_what_is_shown",
    "weight_refs",
    "write_chrome_trace",
]
