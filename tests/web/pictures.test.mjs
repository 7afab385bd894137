import assert from 'node:assert/strict'
import { test } from 'node:test'

import { downstream, finalPictures } from '../../web/pictures.js'

// loader → budget (in subgraph 12) → sampler → decode → save, and decode → upscale → save; a mask of its own
const PROMPT = {
  1: { inputs: { name: 'flux' } },
  '12:3': { inputs: { model: ['1', 0], budget: 0.6 } },
  7: { inputs: { model: ['12:3', 0], steps: 20 } },
  9: { inputs: { samples: ['7', 0] } },
  10: { inputs: { images: ['9', 0] } },
  11: { inputs: { image: ['9', 0] } },
  13: { inputs: { images: ['11', 0] } },
  20: { inputs: {} },
  21: { inputs: { images: ['20', 0] } }
}
const image = (filename, more) => ({ images: [{ filename, subfolder: '', type: 'output', ...more }] })
const entry = (outputs, prompt = PROMPT) => ({ prompt: [0, 'id', prompt, {}, []], outputs })
const names = (queries) => queries.map((query) => new URLSearchParams(query).get('filename'))

test('what depends on a node is found at any distance, also out of a subgraph', () => {
  assert.deepEqual([...downstream(PROMPT, '12:3')], [['12:3', 0], ['7', 1], ['9', 2], ['10', 3], ['11', 3], ['13', 4]])
  assert.deepEqual([...downstream(PROMPT, '21')], [['21', 0]])
})

test('the picture is the one nearest to the sampler, not an upscaled one or one of another branch', () => {
  const outputs = { 13: image('upscaled.png'), 10: image('decoded.png', { subfolder: 'a b', type: 'temp' }), 21: image('mask.png') }
  assert.deepEqual(finalPictures(entry(outputs), '12:3'), ['filename=decoded.png&subfolder=a+b&type=temp'])
  assert.deepEqual(names(finalPictures(entry({ 13: image('upscaled.png'), 21: image('mask.png') }), '12:3')), ['upscaled.png'])
})

test('of two samplers after one budget it is the last', () => {
  const prompt = { ...PROMPT, 27: { inputs: { model: ['12:3', 0] } }, 29: { inputs: { samples: ['27', 0] } }, 30: { inputs: { images: ['29', 0] } } }
  assert.deepEqual(names(finalPictures(entry({ 10: image('first.png'), 30: image('second.png') }, prompt), '12:3')), ['second.png'])
})

test('a map, a difference or a chart of ours is no picture of the run', () => {
  const prompt = {
    ...PROMPT,
    40: { class_type: 'DyDiTHeatmap', inputs: { model: ['12:3', 0], latent: ['7', 0] } },
    41: { inputs: { images: ['40', 0] } },
    42: { class_type: 'DyDiTSweepSheet', inputs: { model: ['12:3', 0], image: ['9', 0] } },
    43: { inputs: { images: ['42', 1] } }
  }
  const reports = { 41: image('heatmap.png'), 43: image('chart.png') }
  assert.deepEqual(names(finalPictures(entry({ ...reports, 10: image('decoded.png') }, prompt), '12:3')), ['decoded.png'])
  assert.deepEqual(finalPictures(entry(reports, prompt), '12:3'), [])
})

test('of a list of runs, or of frames, they are all', () => {
  const images = ['one.png', 'two.png'].map((filename) => ({ filename, type: 'temp' }))
  assert.deepEqual(names(finalPictures(entry({ 10: { images } }), '12:3')), ['one.png', 'two.png'])
})

test('a prompt that made no picture, a video, or nothing behind this node has none', () => {
  for (const outputs of [{}, { 10: { text: ['x'] } }, { 10: image('clip.mp4') }, { 21: image('mask.png') }])
    assert.deepEqual(finalPictures(entry(outputs), '12:3'), [])
})
