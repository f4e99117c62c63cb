"""Bytes of HBM that a compiled program touches, read off its text."""

import importlib

from repository import ROOT

# Two tokens over three layers: weights are sliced inside a nested fusion, the cache is updated in place, a copy of the
# loop's input is made once, and what lies in on-chip memory is free.
HLO = """\
HloModule jit_decode, is_scheduled=true

%bitcasts (p: bf16[6,8]) -> bf16[8,6] {
  %p = bf16[6,8]{1,0} parameter(0)
  ROOT %turned = bf16[8,6]{0,1} bitcast(%p)
}
%slices (p: bf16[3,8,8], i: s32[]) -> bf16[8,8] {
  %p = bf16[3,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = bf16[1,8,8]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  ROOT %layer = bf16[8,8]{1,0} bitcast(%part)
}
%product (p.0: bf16[3,8,8], p.1: s32[], p.2: bf16[4,8]) -> bf16[4,8] {
  %p.0 = bf16[3,8,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = bf16[4,8]{1,0:T(8,128)S(1)} parameter(2)
  %w = bf16[8,8]{1,0} fusion(%p.0, %p.1), kind=kLoop, calls=%slices
  ROOT %y = bf16[4,8]{1,0:T(8,128)S(1)} convolution(%p.2, %w), dim_labels=bf_oi->bf
}
%update (c: bf16[3,16,8], n: bf16[1,1,8], i: s32[]) -> bf16[3,16,8] {
  %c = bf16[3,16,8]{2,1,0} parameter(0)
  %n = bf16[1,1,8]{2,1,0:S(1)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = bf16[3,16,8]{2,1,0} dynamic-update-slice(%c, %n, %i, %i, %i)
}
%head (p.0: bf16[6,8], p.1: bf16[4,8]) -> bf16[4,6] {
  %p.0 = bf16[6,8]{1,0} parameter(0)
  %p.1 = bf16[4,8]{1,0:S(1)} parameter(1)
  %w = bf16[8,6]{0,1} fusion(%p.0), kind=kLoop, calls=%bitcasts
  ROOT %y = bf16[4,6]{1,0:S(1)} convolution(%p.1, %w), dim_labels=bf_io->bf
}
%three (s.1: (s32[])) -> pred[] {
  %bound.1 = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%i, %bound.1), direction=LT
}
%two (s.2: (s32[])) -> pred[] {
  %bound.2 = s32[] constant(2)
  ROOT %less.2 = pred[] compare(%i, %bound.2), direction=LT
}
%layers (s.3: (s32[], bf16[3,8,8], bf16[3,16,8])) -> (s32[], bf16[3,8,8], bf16[3,16,8]) {
  %w = bf16[3,8,8]{2,1,0} get-tuple-element(%s.3), index=1
  %c = bf16[3,16,8]{2,1,0} get-tuple-element(%s.3), index=2
  %i = s32[]{:S(2)} get-tuple-element(%s.3), index=0
  %x = bf16[4,8]{1,0:T(8,128)S(1)} broadcast(%i), dimensions={}
  %y = bf16[4,8]{1,0:T(8,128)S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%product
  %n = bf16[1,1,8]{2,1,0:S(1)} slice(%y), slice={[0:1], [0:8]}
  %kept = bf16[3,16,8]{2,1,0} fusion(%c, %n, %i), kind=kLoop, calls=%update
  ROOT %t = (s32[], bf16[3,8,8], bf16[3,16,8]) tuple(%i, %w, %kept)
}
%tokens (s.4: (s32[], bf16[6,8])) -> (s32[], bf16[6,8]) {
  %t = (s32[], bf16[3,8,8], bf16[3,16,8]) while(%s.4), condition=%three, body=%layers
  %h = bf16[6,8]{1,0} get-tuple-element(%s.4), index=1
  %x = bf16[4,8]{1,0:S(1)} get-tuple-element(%t), index=1
  %logits = bf16[4,6]{1,0:S(1)} fusion(%h, %x), kind=kOutput, calls=%head
  ROOT %u = (s32[], bf16[6,8]) tuple(%i, %h)
}
ENTRY %main (a: bf16[6,8]) -> (s32[], bf16[6,8]) {
  %a = bf16[6,8]{1,0} parameter(0)
  %b = bf16[6,8]{0,1} copy(%a)
  ROOT %loop = (s32[], bf16[6,8]) while(%b), condition=%two, body=%tokens
}
"""


def test_a_loop_reads_its_slices_and_updates_in_place(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    layer, update, head = 8 * 8 * 2, 8 * 2, 6 * 8 * 2
    assert importlib.import_module("hbm_traffic").hbm_bytes(HLO) == 2 * (3 * (layer + update) + head) + 2 * head
