"""The page's style sheet: one column, the system's own fonts, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d2129; --muted: #646b78; --rule: #e4e5e9; --grid: #ececf0;
  --c1: #3b5bdb; --c2: #d9480f; --c3: #2b8a3e; --c4: #868e96; --soft: #eef1fd; --good: #2b8a3e; --bad: #c92a2a;
  --p1: #5c7cfa; --p2: #ff922b; --p3: #51cf66; --p4: #cc5de8; --p5: #22b8cf; --p6: #adb5bd; --p7: #fcc419;
  --p8: #f783ac;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e8eaee; --muted: #9aa2af; --rule: #2e323b; --grid: #282c34;
    --c1: #91a7ff; --c2: #ff9f5a; --c3: #69db7c; --c4: #868e96; --soft: #232a45; --good: #69db7c; --bad: #ff8787;
    --p1: #4c6ef5; --p2: #e8590c; --p3: #37b24d; --p4: #ae3ec9; --p5: #1098ad; --p6: #868e96; --p7: #f59f00;
  --p8: #d6336c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 0 0 4px; letter-spacing: -.005em; }
h3 { font-size: 1rem; margin: 22px 0 6px; }
p { margin: 6px 0; }
a { color: var(--c1); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-top: 44px; }
.lead, .muted { color: var(--muted); }
.warning { color: var(--c2); font-weight: 600; }
.small { font-size: .86rem; }
nav { margin-top: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .92rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .84em; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; }
.cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; margin-top: 24px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px 18px; }
.card .step { font-size: .82rem; color: var(--muted); display: flex; justify-content: space-between; gap: 8px; }
.card .big { font-size: 1.75rem; font-weight: 650; letter-spacing: -.01em; margin: 6px 0 0;
  font-variant-numeric: tabular-nums; }
.card .big .was { color: var(--muted); font-weight: 400; }
.card .big .interval { color: var(--muted); font-weight: 400; font-size: 1.05rem; white-space: nowrap; }
.card p { margin: 2px 0 0; font-size: .92rem; }
.state { border-radius: 99px; padding: 0 9px; font-size: .78rem; border: 1px solid currentColor; }
.state.finished { color: var(--good); } .state.failed { color: var(--bad); }
.state.stopped, .state.unfinished { color: var(--c2); }
.stack > table { margin-top: 14px; } .stack > ul { padding-left: 20px; font-size: .92rem; color: var(--muted); }
.grid { align-items: start; display: grid; grid-template-columns: repeat(2, 1fr); gap: 16px; margin-top: 12px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px 10px; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 6px; }
figure.wide { margin-top: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--muted); }
svg .name { font-size: 11.5px; fill: var(--muted); }
svg .row, svg .name, svg .end { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .row { font-size: 12.5px; } svg .row.value { font-weight: 600; }
svg .end { font-weight: 600; font-size: 11.5px; }
.c1, .m1 { --own: var(--c1); } .c2, .m2 { --own: var(--c2); } .c3 { --own: var(--c3); } .c4, .m4 { --own: var(--c4); }
.p1 { --own: var(--p1); } .p2 { --own: var(--p2); } .p3 { --own: var(--p3); } .p4 { --own: var(--p4); }
.p5 { --own: var(--p5); } .p6 { --own: var(--p6); } .p7 { --own: var(--p7); } .p8 { --own: var(--p8); }
.end, .dot, .bar, .part { fill: var(--own); } .line, .whisker { stroke: var(--own); }
svg line.grid { stroke: var(--grid); stroke-width: 1; } svg line.half { stroke: var(--muted); stroke-dasharray: 3 3; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { opacity: .35; } svg .whisker { stroke-width: 4; stroke-linecap: round; opacity: .45; }
svg .hit { fill: transparent; } svg .hit:hover { fill: var(--ink); }
svg .inside { fill: #fff; text-anchor: middle; font-size: 13px; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .84rem; color: var(--muted); margin: 6px 0 0; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  background: var(--own); }
.sample { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; margin-top: 14px;
  overflow: hidden; }
.sample .prompt { padding: 12px 18px; background: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
.sample .prompt b { font-weight: 600; }
.sample .answers { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; }
.sample .answer { padding: 12px 18px 14px; border-left: 1px solid var(--rule); min-width: 0; }
.sample .answer:first-child { border-left: 0; }
.sample .who { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 10px; font-size: .84rem; }
.sample .who b { color: var(--own); }
.sample .text { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 4px; max-height: 22em; overflow-y: auto; }
.sample .note { font-size: .8rem; color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums;
  margin-top: 10px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: .84rem; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.b { width: 28%; } td.b i { display: block; height: 10px; border-radius: 3px; background: var(--c1);
  margin-top: 6px; }
.scroll { overflow-x: auto; }
ul.next { padding-left: 0; list-style: none; margin: 10px 0 0; }
ul.next li { background: var(--card); border: 1px solid var(--rule); border-left: 4px solid var(--c1);
  border-radius: 8px; padding: 10px 16px; margin-top: 8px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--muted); }
.warn { border-left: 4px solid var(--c2); background: var(--card); padding: 8px 14px; border-radius: 6px;
  margin-top: 16px; }
.failure { border-left: 4px solid var(--bad); background: var(--card); padding: 12px 18px; border-radius: 6px;
  margin-top: 24px; }
.failure h2 { color: var(--bad); }
footer { margin-top: 56px; color: var(--muted); font-size: .84rem; }
@media (max-width: 760px) {
  .cards, .grid { grid-template-columns: 1fr; }
  .sample .answers { grid-auto-flow: row; }
  .sample .answer { border-left: 0; border-top: 1px solid var(--rule); }
  main { padding: 24px 16px 48px; }
}
@media print { body { background: #fff; } figure, .card, .sample { break-inside: avoid; } nav { display: none; } }
"""
