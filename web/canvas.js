// A DOM widget and the classic canvas it lies on.

export const CANVAS_MARGIN = 10 // the classic canvas takes this off a widget on every side

/** In the classic canvas the element lies above the graph: hand on what pans and zooms. Nodes 2.0 does so itself. */
export function forwardToCanvas(app, element) {
  const classic = () => !window.LiteGraph?.vueNodesMode
  element.addEventListener('wheel', (event) => {
    const scroller = event.target.closest?.('.dydit-status, .dydit-training-lines')
    if (!classic() || (scroller && scroller.scrollHeight > scroller.clientHeight)) return
    event.preventDefault()
    app.canvas.processMouseWheel(event)
  }, { passive: false })
  const handlers = { pointerdown: 'processMouseDown', pointermove: 'processMouseMove', pointerup: 'processMouseUp' }
  for (const [type, handler] of Object.entries(handlers))
    element.addEventListener(type, (event) => {
      if (classic() && (event.button === 1 || event.buttons & 4)) app.canvas[handler](event)
    })
}
