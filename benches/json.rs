//! Encoding and decoding a text like the config of a model with a thousand layers.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::json::{Encoder, Limits, decode_value, encode_value};

const LAYER: &str = r#"{"module": "keras.layers", "class_name": "Conv2D", "config": {"name": "block1a_project_conv",
 "trainable": true, "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"},
 "registered_name": null}, "filters": 32, "kernel_size": [1, 1], "padding": "same", "momentum": 0.99, "epsilon": 0.001},
 "registered_name": null, "build_config": {"input_shape": [null, null, null, 32]}, "name": "block1a_project_conv"}"#;

fn json(c: &mut Criterion) {
    let text = format!("[{}]", vec![LAYER; 1000].join(", "));
    let value = decode_value(text.as_bytes(), &Limits::FILE).expect("it is well formed");
    let mut group = c.benchmark_group("json");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("decode", |b| b.iter(|| decode_value(black_box(text.as_bytes()), &Limits::FILE)));
    group.bench_function("encode", |b| {
        b.iter(|| {
            let mut out = Encoder::new();
            encode_value(black_box(&value), &mut out);
            out.finish()
        });
    });
    group.finish();
}

criterion_group!(benches, json);
criterion_main!(benches);
