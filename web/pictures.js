// Which pictures a run made, read from the prompt as the server ran it: there, subgraphs are unfolded and reroutes gone,
// so links can be followed whatever the graph looks like on screen. No DOM, no ComfyUI.

const REPORTS = new Set(['DyDiTHeatmap', 'DyDiTCompare', 'DyDiTSweepSheet']) // what they draw is no picture of the run
const SHOWN = /\.(png|jpe?g|webp|avif|gif)$/i

/** How many links each node is away from `start`, for the nodes that depend on it but not by way of a map or a report of ours. */
export function downstream(prompt, start) {
  const distance = new Map([[start, 0]])
  for (const [id, steps] of distance) // nodes found on the way are visited too
    for (const [other, { inputs, class_type: kind }] of Object.entries(prompt))
      if (!distance.has(other) && !REPORTS.has(kind) && Object.values(inputs).some((input) => Array.isArray(input) && input[0] === id))
        distance.set(other, steps + 1)
  return distance
}

/** The final pictures behind a node in an entry of the server's history, as queries of /view: of a list of runs or a video, all. */
export function finalPictures({ prompt: [, , prompt], outputs }, node) {
  const distance = downstream(prompt, node)
  const found = Object.entries(outputs).flatMap(([id, { images = [] }]) => {
    const shown = images.filter(({ filename }) => SHOWN.test(filename))
    return shown.length && distance.has(id) ? [{ shown, steps: distance.get(id) }] : []
  })
  // Nearest to the sampler: what was decoded, before upscaling or masking. Of several samplers, the last.
  const best = found.reduce((best, one) => (!best || one.steps <= best.steps ? one : best), null)
  return (best?.shown ?? []).map(({ filename, subfolder = '', type = 'output' }) => String(new URLSearchParams({ filename, subfolder, type })))
}
