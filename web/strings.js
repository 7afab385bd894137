// Every word the token map shows. A sentence is one entry, so that a translation may order it as its language does.
// An entry `<key>.one` (or another of Intl.PluralRules' names) stands in for `<key>` where its {n} calls for it.

import JA from './strings.ja.js'
import ZH from './strings.zh.js'

const EN = {
  'percent': '{n}\u00a0%',
  'list': ' · ', // between parts of a line

  'map': 'Token map',
  'map.none': 'No map yet. Run the workflow to see, step by step, which tokens the model computes. ' +
    'A result that comes from the cache has none: change the seed.',
  'map.waiting': 'The map fills with the first step.',
  'status.moved': 'The slider is at {now} now; this run asked for {asked}. It could not have gone below {floor}.',
  'map.nothing': 'No map: see below.',
  'map.later': 'This map can be opened when the run has ended.',
  'map.unreadable': 'The map could not be read.',
  'map.gone': 'The map of this run cannot be shown: {why}',
  'map.label': 'Token map of {rows} rows by {cols} columns, {where}, {numbers}. Arrow keys read it cell by cell.',
  'map.hint': 'point at a token',

  'token': '{share} · {place}',
  'token.row': 'row {first}',
  'token.rows': 'rows {first}–{last}',
  'token.column': 'column {first}',
  'token.columns': 'columns {first}–{last}',
  'token.place': '{row}, {column}',
  'token.spoken': '{place}: computed {share}',

  'legend.low': '0\u00a0%',
  'legend.high': '100\u00a0%',
  'legend.what': 'computed',
  'legend': 'Colours of the map: dark was skipped everywhere, bright was computed everywhere. The scale is the same in every run.',

  'step': 'step {step} of {total}',
  'step.mean': 'mean of {n} steps',
  'step.mean.one': 'mean of {n} step',
  'sigma': 'σ\u00a0{sigma}',
  'block': 'block {n} ({name})',
  'block.all': 'all blocks, mean',
  'branch.all': 'both',
  'branch.cond': 'positive',
  'branch.uncond': 'negative',
  'branch.all.label': 'positive and negative prompt, mean',
  'branch.cond.label': 'positive prompt (cond)',
  'branch.uncond.label': 'negative prompt (uncond)',
  'frame': 'frame {frame} of {total}',
  'frame.mean': 'mean of {n} frames',
  'frame.mean.one': 'mean of {n} frame',
  'frame.play': 'Play the frames',
  'frame.stop': 'Stop playing',

  'cost.tokens': 'tokens {share}',
  'cost.tokens.frames': 'video tokens {share}',
  'cost.flops': 'FLOPs {share}',
  'cost.flops.step': 'step FLOPs {share}',
  'cost.seconds': '{seconds} s',

  'score.flops': 'FLOPs',
  'score.all': 'mean',
  'score.blocks': 'blocks',
  'score.steps.label': 'Step shown on the token map',
  'score.steps.title': 'FLOPs of each step as a share of the dense model. Solid: computed. Ruled: skipped or reused. ' +
    'Dashed line: the budget asked for. Thick line: the other run of a comparison. Drag to look back; the last step follows a running sampler again. ' +
    'The bar at the left is the mean of all steps.',
  'score.matrix.label': 'Steps across, blocks down. Arrow keys choose a step and a block; Escape shows all blocks again.',
  'score.matrix.title': 'Tokens computed in each block (down) at each step (across), in the colours of the map. ' +
    'Click or drag to open one. The first row is the mean of all blocks, the first column the mean of all steps.',

  'choose.block': 'Block shown on the token map',
  'choose.branch': 'Prompt shown on the token map',
  'choose.frame': 'Frame shown on the token map',

  'widths.heads': 'heads',
  'widths.groups': 'channels',
  'widths.title': 'Attention heads and channel groups of the MLP. Tall: computed. Short: skipped.',
  'widths.count': '{n} of {total}',

  'tools.map': 'map',
  'tools.picture': 'picture',
  'tools.picture.label': 'Fade from the map to the picture of this run',
  'tools.picture.value': 'map {map}, picture {picture}',
  'tools.pin': 'Pin',
  'tools.unpin': 'Unpin',
  'tools.pin.title': 'Keep this run as A, and compare the next runs with it',
  'tools.unpin.title': 'Let go of run A',
  'tools.copy': 'Copy',
  'tools.copy.title': 'Copy the map as a PNG, with its legend and numbers',
  'tools.copied': 'Copied',
  'tools.saved': 'Saved',
  'tools.saved.why': 'The browser does not let this page use the clipboard: the PNG was saved as {file}.',
  'tools.details': 'Details',
  'tools.details.title': 'Show or hide steps by blocks, the choices, and heads and channels',

  'compare': 'Run shown',
  'compare.a': 'A',
  'compare.b': 'B',
  'compare.both': 'A + B',
  'compare.a.label': 'Run A, pinned',
  'compare.b.label': 'Run B, the latest',
  'compare.both.label': 'Both runs, side by side',
  'compare.wait': 'Run again: the next run is B.',
  'compare.asked': 'asked {share}',
  'compare.run': '{letter}: {numbers}',

  'sheet.title': 'DyDiT: what was computed',
  'sheet.file': 'dydit-map.png',

  'training': 'Training',
  'training.none': 'Not trained yet. Press Run: the error at each budget is drawn here as it falls. ' +
    'It can be stopped at any time and goes on when it is queued again.',
  'training.bar': 'How much is done',
  'training.chart': 'Error at each budget over the training steps, in dB; lower is better',
  'training.recording': 'Dense evaluations to learn from: {done} of {total}',
  'training.training': 'Training: step {done} of {total}',
  'training.finishing': 'Trained for {done} steps; measuring how the gates are spread',
  'training.done': 'Trained for {done} steps',
  'training.interrupted': 'Stopped at step {done} of {total}',
  'training.failed': 'Stopped by an error at step {done} of {total}',
  'training.each': '{seconds} s each',
  'training.left': '{time} left',
  'training.seconds': '{count} s',
  'training.minutes': '{count} min',
  'training.hours': '{count} h',
  'training.step': 'step {step}',
  'training.db': 'dB',
  'training.entry': 'budget {budget}: {error} dB',

  'state.ready': 'ready',
  'state.refused': 'refused',
  'state.running': 'running',
  'state.done': 'done',
  'state.interrupted': 'interrupted',
  'state.failed': 'failed'
}

export const TABLES = { en: EN, zh: ZH, ja: JA }

let table, plural
speak('en')

/** Take the language of a locale from here on, and say which that is: English where there is no table for it. */
export function speak(locale) {
  const language = Object.hasOwn(TABLES, locale) ? locale : 'en'
  table = { ...EN, ...TABLES[language] }
  plural = new Intl.PluralRules(language)
  return language
}

/** The string of a key, with each {name} replaced by the value of that name. */
export function t(key, values = {}) {
  const text = table[`${key}.${plural.select(values.n)}`] ?? table[key]
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name])
}
