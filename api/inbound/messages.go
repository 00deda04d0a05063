package inbound

import (
	"encoding/binary"
	"errors"
	"math"
	"net"
	"sync"
	"time"
)

const (
	// preface is what an HTTP/2 client says first, in bytes (RFC 9113 section 3.4).
	preface = 24
	// messageHeader comes before each message of gRPC: a flag and the length (PROTOCOL-HTTP2, "Length-Prefixed-Message").
	messageHeader = 5
	// maxStreams bounds what is kept of a connection; servers refuse streams long before.
	maxStreams = 4096
	// crumbs and crumb are in how many frames a message may come: so many, and one more for each so many bytes. What holds a
	// frame takes some 70 bytes with grpc-go, also where the frame has one.
	crumbs = 64
	crumb  = 512
)

// errHungUp is what the server reads of a connection that was closed for its messages.
var errHungUp = errors.New("a message was in too many pieces, or too many pieces wait to be read, or too many streams are open: the connection is closed")

// Watch has each message that has begun to arrive through a gRPC server's connection arrive in time, on whatever stream and
// however many came before it on that stream. What has come of it is kept in memory until then, so the connection of a client
// that lets the time pass is closed, as is that of one who sends a message in crumbs. conn carries HTTP/2 in the clear: a TLS
// connection after its handshake.
func Watch(conn net.Conn, patience time.Duration) net.Conn {
	return WatchUnread(conn, patience, math.MaxInt)
}

// WatchUnread is Watch for a server whose streams have a window of 64 KiB. It closes the connection too when on one stream more
// frames have come than most that the server may not have read yet: small messages, whole ones too, take more memory than what
// is in them. A client of messages of n bytes, all of which are read at once, has up to 18 432/n frames there.
func WatchUnread(conn net.Conn, patience time.Duration, most int) net.Conn {
	w := &watched{Conn: conn, patience: patience, most: most, streams: map[uint32]*stream{}, in: frames{skip: preface}}
	w.late = time.AfterFunc(time.Hour, w.look)
	w.late.Stop()
	return w
}

type watched struct {
	net.Conn
	patience time.Duration
	most     int // of frames of a stream that are unread
	late     *time.Timer

	mu      sync.Mutex
	in, out frames
	widens  increment          // of the frame that out is in
	streams map[uint32]*stream // those that both sides have open
	armed   bool               // late runs
	hungUp  bool
}

// stream is what comes on one.
type stream struct {
	arrival
	unread
}

// arrival is the message that arrives on a stream.
type arrival struct {
	head  [messageHeader]byte
	have  int    // of head
	left  uint32 // of the message, once head is whole
	size  int    // of what has come of it
	count int    // of the frames that brought it
	began time.Time
}

func (a *arrival) underWay() bool { return a.have > 0 }

// Read reads from the client.
func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.in.see(p[:n], w.opened, w.arrived, w.ended)
	if w.hungUp {
		_ = w.Conn.Close()
		return 0, errHungUp
	}
	return n, err
}

// Write writes to the client.
func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock() // before the client answers what it says
	w.out.see(p, func(frame) {}, w.widening, w.said)
	w.mu.Unlock()
	return w.Conn.Write(p)
}

// Close ends the connection.
func (w *watched) Close() error {
	w.mu.Lock()
	w.late.Stop()
	w.hungUp = true
	w.mu.Unlock()
	return w.Conn.Close()
}

// opened notes a stream. w.mu is held here and below.
func (w *watched) opened(f frame) {
	if f.kind == typeData {
		if s := w.streams[f.stream]; s != nil {
			s.count++
			s.frame(f.length)
		}
		return
	}
	if f.kind != typeHeaders || w.streams[f.stream] != nil {
		return
	}
	if len(w.streams) >= maxStreams {
		w.hungUp = true
		return
	}
	w.streams[f.stream] = &stream{}
}

// widening takes a piece of what the server lets more come with.
func (w *watched) widening(f frame, p []byte) {
	if f.kind == typeWindow {
		w.widens.add(p)
	}
}

// said hears what the server said with a frame.
func (w *watched) said(f frame) {
	if f.kind == typeWindow {
		n := w.widens.take()
		if s := w.streams[f.stream]; s != nil {
			s.widen(n)
		}
	}
	w.ended(f)
}

// ended forgets a stream on which one side says no more: nothing arrives any more, or nobody waits for it.
func (w *watched) ended(f frame) {
	if f.ends() {
		delete(w.streams, f.stream)
	}
}

// arrived takes a piece of what a stream carries.
func (w *watched) arrived(f frame, p []byte) {
	s := w.streams[f.stream]
	if s == nil || f.kind != typeData {
		return
	}
	s.content(len(p))
	a := &s.arrival
	for len(p) > 0 {
		if !a.underWay() {
			a.began = time.Now()
			w.arm(w.patience)
		}
		if a.have < messageHeader {
			n := copy(a.head[a.have:], p)
			a.have, p = a.have+n, p[n:]
			a.size += n
			if a.have < messageHeader {
				break
			}
			a.left = binary.BigEndian.Uint32(a.head[1:])
		}
		n := min(uint64(a.left), uint64(len(p)))
		a.left, p = a.left-uint32(n), p[n:]
		a.size += int(n)
		if a.left == 0 {
			*a = arrival{count: min(len(p), 1)} // the next one may have begun in the same frame
		}
	}
	if a.count > crumbs+a.size/crumb || s.frames > w.most {
		w.hungUp = true
	}
}

// arm has it looked for late messages after d at most.
func (w *watched) arm(d time.Duration) {
	if !w.armed && !w.hungUp {
		w.armed = true
		w.late.Reset(d)
	}
}

// look closes the connection of a late message.
func (w *watched) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = false
	now, next := time.Now(), time.Duration(-1)
	for _, s := range w.streams {
		if !s.underWay() {
			continue
		}
		left := w.patience - now.Sub(s.began)
		if left <= 0 {
			w.hungUp = true
			_ = w.Conn.Close()
			return
		}
		if next < 0 || left < next {
			next = left
		}
	}
	if next >= 0 {
		w.arm(next)
	}
}
