// What there is to show of a record: between what is known and what is drawn. No DOM, no ComfyUI.

import { mapPath } from './maps.js'
import { resolve } from './selection.js'

/** One run as it is shown: what of it, its map if it is here, where to fetch it if not, or why it cannot be had. */
function pane(letter, run, selection, maps) {
  const at = resolve(selection, run)
  if (!at) return { letter, run, at, path: '', map: null, error: '', later: false }
  const live = run.liveMap(at)
  const path = live ? '' : mapPath(run.id, at)
  const map = live ?? maps.get(path)
  const later = !map && !run.ended // the server has the maps of a run when it has ended
  return { letter, run, at, map, path: later ? '' : path, error: maps.error(path), later }
}

/**
 * `panes` are the maps to draw, `front` is the one whose steps and blocks are shown, `sides` are both runs of a
 * comparison, or the only run.
 */
export function sceneOf(record, maps) {
  const look = (letter, run) => pane(letter, run, record.selection, maps)
  if (!record.compares) {
    const only = look(record.pinned ? 'A' : '', record.run)
    return { record, panes: [only], front: only, sides: [only] }
  }
  const sides = [look('A', record.pinned), look('B', record.run)]
  const panes = sides.filter(({ letter }) => ['both', letter.toLowerCase()].includes(record.compare))
  return { record, panes, front: panes.at(-1), sides }
}
