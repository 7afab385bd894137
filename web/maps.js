// Fetches single maps of stored runs when they are looked at, and keeps the last ones. No DOM, no ComfyUI.

import { decodeGrid } from './heatmap.js'
import { t } from './strings.js'

const KEPT_MAPS = 400 // of 64 × 64 bytes: 1.6 MB

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds))

/** Where the server has a map; also what it is kept under. */
export function mapPath(run, { step, block, branch, frame }) {
  const query = new URLSearchParams()
  if (branch !== null) query.set('branch', branch)
  if (frame !== null) query.set('frame', frame)
  const path = `/dydit/trace/${encodeURIComponent(run)}/${step}/${block}`
  return String(query) ? `${path}?${query}` : path
}

/** A map as it is shown; it throws a sentence where the server's answer is none. */
function read(answer) {
  const bytes = decodeGrid(answer)
  if (!bytes) throw new Error(t('map.unreadable'))
  const { rows, cols, token_rows, token_cols, heads, groups } = answer
  return { rows, cols, token_rows, token_cols, bytes, heads, groups }
}

/**
 * One request at a time for the whole page. While it is under way, what a view wants is replaced by what it wants
 * next: scrubbing fast asks for where one stops, not for everything on the way.
 */
export class Maps {
  #ask
  #wait
  #maps = new Map() // path → map, least recently used first
  #errors = new Map() // path → why it could not be had; forgotten when the view looks elsewhere
  #wanted = new Map() // view → its paths; the last entry is the newest
  #busy = false

  /** `ask(path)` promises { status, retryAfter, body }; `wait(seconds)` promises to resolve then. */
  constructor(ask, wait = sleep) {
    this.#ask = ask
    this.#wait = wait
  }

  get(path) {
    const map = this.#maps.get(path)
    if (map) {
      this.#maps.delete(path)
      this.#maps.set(path, map)
    }
    return map ?? null
  }

  error(path) {
    return this.#errors.get(path) ?? ''
  }

  /** What a view (anything with `refresh()`) needs now, in place of what it needed before. */
  want(view, paths) {
    for (const path of this.#wanted.get(view) ?? []) if (!paths.includes(path)) this.#errors.delete(path)
    this.#wanted.delete(view)
    if (paths.length) this.#wanted.set(view, paths)
    this.#pump()
  }

  #next() {
    for (const [view, paths] of [...this.#wanted].reverse()) {
      const path = paths.find((path) => !this.#maps.has(path) && !this.#errors.has(path))
      if (path) return { view, path }
    }
    return null
  }

  async #pump() {
    if (this.#busy) return
    this.#busy = true
    for (let next = this.#next(); next; next = this.#next()) {
      await this.#fetch(next.path)
      if (this.#wanted.get(next.view)?.includes(next.path)) next.view.refresh()
    }
    this.#busy = false
    for (const [view, paths] of this.#wanted) // views of removed nodes must not be held on to
      if (!paths.some((path) => this.#errors.has(path))) this.#wanted.delete(view)
  }

  async #fetch(path) {
    try {
      const { status, retryAfter, body } = await this.#ask(path)
      if (status === 429) return await this.#wait(retryAfter)
      if (status !== 200) throw new Error(body.error)
      this.#maps.set(path, read(body))
      if (this.#maps.size > KEPT_MAPS) this.#maps.delete(this.#maps.keys().next().value)
    } catch (error) {
      this.#errors.set(path, error.message)
    }
  }
}
