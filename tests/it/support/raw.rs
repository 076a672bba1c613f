//! AMQP by hand, for what lapin cannot write: just enough to publish one message.

use lapin::uri::AMQPUri;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{World, body, soon};

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend_from_slice(payload);
    out.push(0xce);
    out
}

fn method(channel: u16, class: u16, id: u16, arguments: &[u8]) -> Vec<u8> {
    let payload = [&class.to_be_bytes()[..], &id.to_be_bytes(), arguments].concat();
    frame(1, channel, &payload)
}

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()][..], text].concat()
}

async fn answer(stream: &mut TcpStream) -> Vec<u8> {
    let mut head = [0; 7];
    stream.read_exact(&mut head).await.unwrap();
    let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
    let mut payload = vec![0; usize::try_from(length).unwrap() + 1];
    stream.read_exact(&mut payload).await.unwrap();
    payload
}

/// Publishes a job whose `correlation_id` is not UTF-8.
pub(crate) async fn publish_garbled(world: &World) {
    publish(world, "garbled", 0x0400, &short(b"\xff\xfe\xfd")).await;
}

/// Publishes a job with a header whose tables are nested that deep.
pub(crate) async fn publish_nested(world: &World, levels: usize) {
    let mut table = Vec::new();
    for _ in 0..levels {
        let inner = table;
        table =
            [&short(b"n")[..], b"F", &u32::try_from(inner.len()).unwrap().to_be_bytes()].concat();
        table.extend(inner);
    }
    let mut headers = u32::try_from(table.len()).unwrap().to_be_bytes().to_vec();
    headers.extend(table);
    publish(world, "nested", 0x2000, &headers).await;
}

/// Publishes a job with properties as they are on the wire.
async fn publish(world: &World, request_id: &str, flags: u16, properties: &[u8]) {
    let uri: AMQPUri = world.environment()["AMQP_URL"].parse().unwrap();
    let address = (uri.authority.host.as_str(), uri.authority.port);
    soon("a publish by hand", async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"AMQP\x00\x00\x09\x01").await.unwrap();
        answer(&mut stream).await;
        let login =
            format!("\0{}\0{}", uri.authority.userinfo.username, uri.authority.userinfo.password);
        let mut start_ok = vec![0, 0, 0, 0]; // no client properties
        start_ok.extend(short(b"PLAIN"));
        start_ok.extend(u32::try_from(login.len()).unwrap().to_be_bytes());
        start_ok.extend(login.as_bytes());
        start_ok.extend(short(b"en_US"));
        stream.write_all(&method(0, 10, 11, &start_ok)).await.unwrap();
        answer(&mut stream).await; // tune
        let tune_ok =
            [&2047_u16.to_be_bytes()[..], &131_072_u32.to_be_bytes(), &0_u16.to_be_bytes()]
                .concat();
        stream.write_all(&method(0, 10, 31, &tune_ok)).await.unwrap();
        let open = [short(uri.vhost.as_bytes()), short(b""), vec![0]].concat();
        stream.write_all(&method(0, 10, 40, &open)).await.unwrap();
        answer(&mut stream).await;
        stream.write_all(&method(1, 20, 10, &short(b""))).await.unwrap();
        answer(&mut stream).await;
        stream.write_all(&method(1, 85, 10, &[0])).await.unwrap(); // confirm.select
        answer(&mut stream).await;
        let publish =
            [vec![0, 0], short(b""), short(world.queue("jobs").as_bytes()), vec![1]].concat();
        let text = body(request_id);
        let mut header = vec![0, 60, 0, 0];
        header.extend(u64::try_from(text.len()).unwrap().to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(properties);
        stream.write_all(&method(1, 60, 40, &publish)).await.unwrap();
        stream.write_all(&frame(2, 1, &header)).await.unwrap();
        stream.write_all(&frame(3, 1, text.as_bytes())).await.unwrap();
        let confirm = answer(&mut stream).await;
        assert_eq!(confirm[..4], [0, 60, 0, 80], "basic.ack");
    })
    .await;
}
