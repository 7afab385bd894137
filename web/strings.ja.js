// The words of strings.js in Japanese.

export default {
  'percent': '{n}%',
  'list': ' · ',

  'map': 'トークンマップ',
  'map.none': 'マップはまだありません。ワークフローを実行すると、モデルがどのトークンを計算したかをステップごとに見られます。' +
    'キャッシュから出た結果にはマップがありません。シードを変えてください。',
  'map.waiting': '最初のステップからマップが埋まっていきます。',
  'map.nothing': 'マップはありません。下の説明をご覧ください。',
  'map.later': 'このマップは実行が終わると開けます。',
  'map.unreadable': 'マップを読み取れませんでした。',
  'map.gone': 'この実行のマップは表示できません：{why}',
  'map.label': 'トークンマップ、{rows}行{cols}列、{where}、{numbers}。矢印キーで1マスずつ読めます。',
  'map.hint': 'トークンを指してください',

  'token': '{share} · {place}',
  'token.row': '{first}行目',
  'token.rows': '{first}–{last}行目',
  'token.column': '{first}列目',
  'token.columns': '{first}–{last}列目',
  'token.place': '{row}、{column}',
  'token.spoken': '{place}：{share}を計算',

  'legend.low': '0%',
  'legend.high': '100%',
  'legend.what': '計算済み',
  'legend': 'マップの色：暗い色はすべてのブロックで省かれ、明るい色はすべてのブロックで計算されました。目盛りはどの実行でも同じです。',

  'step': 'ステップ {step}/{total}',
  'step.mean': '{n}ステップの平均',
  'sigma': 'σ\u00a0{sigma}',
  'block.all': '全ブロックの平均',
  'branch.all': '両方',
  'branch.cond': 'ポジ',
  'branch.uncond': 'ネガ',
  'branch.all.label': 'ポジティブとネガティブのプロンプトの平均',
  'branch.cond.label': 'ポジティブプロンプト（cond）',
  'branch.uncond.label': 'ネガティブプロンプト（uncond）',
  'frame': 'フレーム {frame}/{total}',
  'frame.mean': '{n}フレームの平均',

  'cost.tokens': 'トークン {share}',
  'cost.flops': 'FLOPs {share}',
  'cost.seconds': '{seconds}秒',

  'score.flops': 'FLOPs',
  'score.all': '全体',
  'score.blocks': 'ブロック',
  'score.steps.label': 'トークンマップに表示するステップ',
  'score.steps.title': '各ステップのFLOPs（フル計算に対する割合）。塗り：計算した分。縞：省いた、または再利用した分。破線：指定した予算。太線：比較中のもう一方の実行。' +
    'ドラッグすると前のステップを見られます。最後のステップに合わせると、進行中のサンプリングを再び追いかけます。左端の棒は全ステップの平均です。',
  'score.matrix.label': '横がステップ、縦がブロック。矢印キーでステップとブロックを選び、Escで全ブロックの表示に戻ります。',
  'score.matrix.title': '各ステップ（横）の各ブロック（縦）で計算されたトークンを、マップと同じ色で示します。クリックまたはドラッグで開きます。' +
    '1行目は全ブロックの平均、1列目は全ステップの平均です。',

  'choose.block': 'トークンマップに表示するブロック',
  'choose.branch': 'トークンマップに表示するプロンプト',
  'choose.frame': 'トークンマップに表示するフレーム',

  'widths.heads': 'ヘッド',
  'widths.groups': 'チャンネル',
  'widths.title': 'アテンションヘッドとMLPのチャンネルグループ。長い線：計算した。短い線：省いた。',
  'widths.count': '{n}/{total}',

  'tools.map': 'マップ',
  'tools.picture': '画像',
  'tools.picture.label': 'マップからこの実行の画像へフェード',
  'tools.picture.value': 'マップ {map}、画像 {picture}',
  'tools.pin': 'ピン',
  'tools.unpin': 'ピンを解除',
  'tools.pin.title': 'この実行をAとして残し、次からの実行と比べる',
  'tools.unpin.title': '実行Aを手放す',
  'tools.copy': 'コピー',
  'tools.copy.title': 'マップを凡例と数値ごとPNGとしてコピー',
  'tools.copied': 'コピーしました',
  'tools.saved': '保存しました',
  'tools.saved.why': 'ブラウザがこのページでのクリップボードの使用を許可していないため、PNGを {file} として保存しました。',
  'tools.details': '詳細',
  'tools.details.title': 'ステップとブロックの一覧、選択欄、ヘッドとチャンネルの表示を切り替える',

  'compare': '表示する実行',
  'compare.a': 'A',
  'compare.b': 'B',
  'compare.both': 'A + B',
  'compare.a.label': '実行A（ピン留め）',
  'compare.b.label': '実行B（最新）',
  'compare.both.label': '両方の実行を並べる',
  'compare.wait': 'もう一度実行してください。次の実行がBになります。',
  'compare.asked': '指定 {share}',
  'compare.run': '{letter}：{numbers}',

  'sheet.title': 'DyDiT：計算された部分',
  'sheet.file': 'dydit-map.png',

  'state.ready': '準備完了',
  'state.refused': '拒否',
  'state.running': '実行中',
  'state.done': '完了',
  'state.interrupted': '中断',
  'state.failed': '失敗'
}
