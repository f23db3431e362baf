use super::curves::{self, Run};
use super::subtitle;
use anyhow::{Context, anyhow};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::path::Path;

/// Size of the picture.
const WIDTH: u32 = 1000;
const HEIGHT: u32 = 640;
/// It is drawn so many times larger and then averaged, which smooths every edge.
const SUPERSAMPLING: u32 = 3;
/// Channels have 32 levels: the eye sees no more at an edge, and the file is a third smaller.
const LEVEL: f64 = 255.0 / 31.0;
/// Part of the height for the learning rate.
const RATE_SHARE: f64 = 0.26;

const TEXT: RGBColor = RGBColor(38, 38, 38);
const GRID: RGBColor = RGBColor(225, 225, 225);
/// Of runs one after the other, each on a level; blue, orange, green, red, purple, brown: told apart also by people
/// who see red and green alike, as their lightness differs.
const COLOURS: [RGBColor; 6] = [
    RGBColor(33, 115, 181),
    RGBColor(230, 115, 0),
    RGBColor(33, 140, 58),
    RGBColor(197, 41, 49),
    RGBColor(132, 90, 181),
    RGBColor(123, 82, 66),
];
/// With more runs than this, single steps would hide the curves.
const MOST_RAW: usize = 3;

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
type Chart<'a, 'b> =
    ChartContext<'a, BitMapBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws the runs to a PNG file.
pub fn write(path: &Path, runs: &[Run], span: u64) -> anyhow::Result<()> {
    let (width, height) = (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING);
    let mut pixels = vec![255; (width * height * 3) as usize];
    let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    draw(&root, runs, span).map_err(|error| anyhow!("drawing: {error}"))?;
    drop(root);

    let file = BufWriter::new(File::create(path)?);
    let mut encoder = ::png::Encoder::new(file, WIDTH, HEIGHT);
    encoder.set_color(::png::ColorType::Rgb);
    encoder.set_compression(::png::Compression::High);
    // Lines on white: neighbours tell nothing that repetition does not tell better.
    encoder.set_filter(::png::Filter::NoFilter);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&averaged(&pixels))?;
    writer.finish().context("writing the file's end")
}

/// Each pixel is the mean of the square that was drawn for it.
fn averaged(large: &[u8]) -> Vec<u8> {
    let (n, width) = (SUPERSAMPLING as usize, WIDTH as usize);
    let stride = width * n * 3;
    let mut small = Vec::with_capacity(width * HEIGHT as usize * 3);
    for (y, x) in (0..HEIGHT as usize).flat_map(|y| (0..width).map(move |x| (y, x))) {
        for channel in 0..3 {
            let corner = y * n * stride + x * n * 3 + channel;
            let square =
                (0..n * n).map(|i| usize::from(large[corner + i / n * stride + i % n * 3]));
            let mean = square.sum::<usize>() as f64 / (n * n) as f64;
            small.push(((mean / LEVEL).round() * LEVEL).round() as u8);
        }
    }
    small
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(root: &Area<'_>, runs: &[Run], span: u64) -> Drawn {
    let faces =
        [(FontStyle::Normal, dejavu::sans::regular()), (FontStyle::Bold, dejavu::sans::bold())];
    for (style, font) in faces {
        register_font("sans-serif", style, font).map_err(|_| "the built-in font cannot be read")?;
    }
    root.fill(&WHITE)?;
    let (head, charts) = root.split_vertically(px(head_height(runs)));
    header(&head, runs, span)?;
    let below = (f64::from(HEIGHT - head_height(runs)) * RATE_SHARE) as u32;
    let (losses, rates) = charts.split_vertically(px(HEIGHT - head_height(runs) - below));
    let steps = curves::step_range(runs);
    loss_chart(&losses, runs, &steps)?;
    rate_chart(&rates, runs, &steps)
}

/// Lengths are those of the finished picture.
fn px(length: u32) -> u32 {
    length * SUPERSAMPLING
}

fn font(size: u32) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", px(size)).into_font()).color(&TEXT)
}

const TITLE_Y: u32 = 16;
const ROW_HEIGHT: u32 = 24;
const LEFT: u32 = 24;

fn head_height(runs: &[Run]) -> u32 {
    let rows = if runs.len() == 1 { 2 } else { runs.len() as u32 + 1 };
    TITLE_Y + rows * ROW_HEIGHT + 14
}

/// Title and legend stand above the plot, where no curve can come.
fn header(area: &Area<'_>, runs: &[Run], span: u64) -> Drawn {
    let bold = TextStyle::from(("sans-serif", px(18), FontStyle::Bold).into_font()).color(&TEXT);
    let at = |x: u32, y: u32| (px(x) as i32, px(y) as i32);
    let row = |i: usize| TITLE_Y + 4 + ROW_HEIGHT * (i as u32 + 1);
    let mean = match span {
        1 => "training".to_string(),
        span => format!("training, mean of some {span} steps"),
    };
    if let [run] = runs {
        area.draw(&Text::new(
            format!("{}: {}", run.name, subtitle(&run.log)),
            at(LEFT, TITLE_Y),
            bold,
        ))?;
        let mut entries = vec![(Sign::Line(COLOURS[0]), mean)];
        if span > 1 {
            entries.push((Sign::Faint(COLOURS[0]), "each step".into()));
        }
        if !run.evaluations.is_empty() {
            entries.push((Sign::Point(EVALUATION), evaluation_label(run)));
        }
        return legend_row(area, &entries, row(0));
    }
    area.draw(&Text::new(
        format!("{} runs; lines: {mean}; points: evaluation", runs.len()),
        at(LEFT, TITLE_Y),
        bold,
    ))?;
    for (i, run) in runs.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let best = match run.evaluations.is_empty() {
            true => String::new(),
            false => format!("; {}", evaluation_label(run)),
        };
        let label = format!("{}: {}{best}", run.name, subtitle(&run.log));
        legend_row(area, &[(Sign::Both(colour), label)], row(i))?;
    }
    Ok(())
}

fn evaluation_label(run: &Run) -> String {
    let best = run.log.best();
    best.map_or("evaluation".into(), |best| {
        format!("evaluation, best {:.4} at step {}", best.loss, best.step)
    })
}

/// Evaluations of a run that is alone.
const EVALUATION: RGBColor = COLOURS[1];

enum Sign {
    Line(RGBColor),
    Faint(RGBColor),
    Point(RGBColor),
    Both(RGBColor),
}

fn legend_row(area: &Area<'_>, entries: &[(Sign, String)], y: u32) -> Drawn {
    let style = font(15);
    let mut x = px(LEFT) as i32;
    let middle = (px(y) + px(7)) as i32;
    let length = px(30) as i32;
    for (sign, label) in entries {
        let ends = || vec![(x, middle), (x + length, middle)];
        let point =
            |colour: &RGBColor| Circle::new((x + length / 2, middle), px(5), colour.filled());
        match sign {
            Sign::Line(colour) => {
                area.draw(&PathElement::new(ends(), colour.stroke_width(px(3))))?
            }
            Sign::Faint(colour) => area.draw(&PathElement::new(ends(), faint(colour)))?,
            Sign::Point(colour) => area.draw(&point(colour))?,
            Sign::Both(colour) => {
                area.draw(&PathElement::new(ends(), colour.stroke_width(px(3))))?;
                area.draw(&point(colour))?;
            }
        }
        x += length + px(8) as i32;
        area.draw(&Text::new(label.clone(), (x, px(y) as i32), style.clone()))?;
        x += area.estimate_text_size(label, &style)?.0 as i32 + px(28) as i32;
    }
    Ok(())
}

fn faint(colour: &RGBColor) -> ShapeStyle {
    colour.mix(0.4).stroke_width(px(1))
}

fn loss_chart(area: &Area<'_>, runs: &[Run], steps: &Range<f64>) -> Drawn {
    let range = curves::loss_range(runs);
    let ticks = curves::ticks(&range, 8, 0.0);
    let label = |value: &f64| curves::loss_label(*value, &ticks);
    let mut chart = axes(area, (steps, &range))?;
    mesh(&mut chart, (&curves::loss_title(runs), ""), 8, &label)?;
    // A step far above is drawn at the border.
    let inside = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|&(x, y)| (x, y.clamp(range.start, range.end))).collect()
    };
    for (i, run) in runs.iter().enumerate().filter(|_| runs.len() <= MOST_RAW) {
        let colour = COLOURS[i % COLOURS.len()];
        chart.draw_series(LineSeries::new(inside(&run.raw), faint(&colour)))?;
    }
    for (i, run) in runs.iter().enumerate() {
        let style = COLOURS[i % COLOURS.len()].stroke_width(px(3));
        chart.draw_series(LineSeries::new(inside(&run.smooth), style))?;
    }
    for (i, run) in runs.iter().enumerate() {
        let colour = if runs.len() == 1 { EVALUATION } else { COLOURS[i % COLOURS.len()] };
        let points = inside(&run.evaluations);
        let dashes = points.clone();
        chart.draw_series(LineSeries::new(dashes, colour.mix(0.5).stroke_width(px(1))))?;
        chart.draw_series(points.iter().map(|&at| Circle::new(at, px(6), WHITE.filled())))?;
        chart.draw_series(points.iter().map(|&at| Circle::new(at, px(5), colour.filled())))?;
    }
    Ok(())
}

fn rate_chart(area: &Area<'_>, runs: &[Run], steps: &Range<f64>) -> Drawn {
    let range = curves::rate_range(runs);
    let mut chart = axes(area, (steps, &range))?;
    let label = |value: &f64| curves::rate_label(*value);
    mesh(&mut chart, ("learning rate", "optimizer step"), 3, &label)?;
    for (i, run) in runs.iter().enumerate() {
        let style = COLOURS[i % COLOURS.len()].stroke_width(px(2));
        chart.draw_series(LineSeries::new(run.learning_rate.iter().copied(), style))?;
    }
    Ok(())
}

fn axes<'a, 'b>(
    area: &'a Area<'b>,
    (steps, values): (&Range<f64>, &Range<f64>),
) -> Result<Chart<'a, 'b>, Box<dyn std::error::Error>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .margin_right(px(28))
        .margin_left(px(10))
        .margin_bottom(px(8))
        .set_label_area_size(LabelAreaPosition::Left, px(88))
        .set_label_area_size(LabelAreaPosition::Bottom, px(46));
    Ok(builder.build_cartesian_2d(steps.clone(), values.clone())?)
}

fn mesh(
    chart: &mut Chart<'_, '_>,
    (y_title, x_title): (&str, &str),
    n_values: usize,
    value_label: &dyn Fn(&f64) -> String,
) -> Drawn {
    chart
        .configure_mesh()
        .x_labels(12)
        .y_labels(n_values)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| value_label(value))
        .max_light_lines(0)
        .bold_line_style(GRID.stroke_width(px(1)))
        .axis_style(TEXT.stroke_width(px(1)))
        .set_all_tick_mark_size(px(5))
        .label_style(font(14))
        .axis_desc_style(font(15))
        .x_desc(x_title)
        .y_desc(y_title)
        .draw()?;
    Ok(())
}
