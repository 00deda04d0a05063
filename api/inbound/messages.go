package inbound

import (
	"encoding/binary"
	"errors"
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

// errLate is why a connection was closed whose message did not arrive in time.
var errLate = errors.New("a message that had begun did not arrive in time: the connection is closed")

// errHungUp is what the server reads of a connection that was closed for its messages.
var errHungUp = errors.New("a message was in too many pieces, or too many pieces wait to be read, or too many large messages are on their way, " +
	"or too many streams are open: the connection is closed")

// Rules are what Watch holds a connection to.
type Rules struct {
	// Patience is how long a message may take to arrive.
	Patience time.Duration
	// Unread is how many frames of a stream may have come that the server has not read yet: small messages, whole ones too,
	// take more memory than what is in them. For a server whose streams have a window of 64 KiB: a client of messages of n
	// bytes, all of which are read at once, has up to 18 432/n frames there. 0: any number.
	Unread int
	// Large is the room that messages of more than Above bytes need while they arrive, and Whose is who has a place in it.
	// Nil: none is needed.
	Large *Room
	Above int
	Whose string
	// Broken, if set, is told when the connection is closed for one of the rules. It must be quick and not wait for the
	// connection.
	Broken func(err error)
	// WritePatience is how long the client may leave what is written unread, as far as its kernel has no room for it. 0: for
	// ever.
	WritePatience time.Duration
	// Opened, if set, is told of each call that the client opens, and reports whether there is room for it: if not, the
	// connection is closed. Ended is told when their end is written or the client has reset them, and of all that are left
	// when the connection is closed.
	Opened func() bool
	Ended  func(calls int)
	// Wrote, if set, is told how many bytes of content are being written.
	Wrote func(n int)
}

// Watch has each message that has begun to arrive through a gRPC server's connection arrive in time, on whatever stream and
// however many came before it on that stream. What has come of it is kept in memory until then, so the connection of a client
// that lets the time pass is closed, as is that of one who sends a message in crumbs, and of one who breaks the other rules.
// conn carries HTTP/2 in the clear: a TLS connection after its handshake.
func Watch(conn net.Conn, r Rules) net.Conn {
	w := &watched{Conn: conn, rules: r, streams: map[uint32]*stream{}, calls: map[uint32]struct{}{}, in: frames{skip: preface}}
	w.late = time.AfterFunc(time.Hour, w.look)
	w.late.Stop()
	return w
}

type watched struct {
	net.Conn
	rules Rules
	late  *time.Timer

	mu      sync.Mutex
	in, out frames
	widens  increment           // of the frame that out is in
	streams map[uint32]*stream  // those that both sides have open
	calls   map[uint32]struct{} // those whose end is not yet written
	armed   bool                // late runs
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
	leave func() // gives back a large message's place; nil: it has none
}

// over gives back what the message has, if there is one.
func (a *arrival) over() {
	if a.leave != nil {
		a.leave()
	}
	*a = arrival{}
}

func (a *arrival) underWay() bool { return a.have > 0 }

// Read reads from the client.
func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.hungUp { // what comes after the end would count for ever
		if w.in.see(p[:n], w.opened, w.arrived, w.heard); w.hungUp {
			w.broken(errHungUp)
		}
	}
	if w.hungUp {
		_ = w.Conn.Close()
		return 0, errHungUp
	}
	return n, err
}

// Write writes to the client.
func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock() // before the client answers what it says
	w.out.see(p, func(frame) {}, w.saying, w.said)
	w.mu.Unlock()
	if w.rules.WritePatience > 0 {
		if err := w.Conn.SetWriteDeadline(time.Now().Add(w.rules.WritePatience)); err != nil {
			return 0, err
		}
	}
	return w.Conn.Write(p)
}

// Close ends the connection.
func (w *watched) Close() error {
	w.mu.Lock()
	w.late.Stop()
	w.hungUp = true
	for _, s := range w.streams {
		s.over()
	}
	w.callsEnd(len(w.calls))
	clear(w.calls)
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
	w.calls[f.stream] = struct{}{}
	if w.rules.Opened != nil && !w.rules.Opened() {
		w.hungUp = true
	}
}

// saying takes a piece of what the server says: of content, or of what it lets more come with.
func (w *watched) saying(f frame, p []byte) {
	switch {
	case f.kind == typeWindow:
		w.widens.add(p)
	case f.kind == typeData && w.rules.Wrote != nil:
		w.rules.Wrote(len(p))
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
	if f.ends() {
		w.callEnds(f.stream)
	}
}

// heard is told that the client has said a frame.
func (w *watched) heard(f frame) {
	w.ended(f)
	if f.kind == typeReset {
		w.callEnds(f.stream)
	}
}

func (w *watched) callEnds(id uint32) {
	if _, ok := w.calls[id]; ok {
		delete(w.calls, id)
		w.callsEnd(1)
	}
}

func (w *watched) callsEnd(n int) {
	if w.rules.Ended != nil && n > 0 {
		w.rules.Ended(n)
	}
}

// ended forgets a stream on which one side says no more: nothing arrives any more, or nobody waits for it.
func (w *watched) ended(f frame) {
	if !f.ends() {
		return
	}
	if s := w.streams[f.stream]; s != nil {
		s.over()
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
			w.arm(w.rules.Patience)
		}
		if a.have < messageHeader {
			n := copy(a.head[a.have:], p)
			a.have, p = a.have+n, p[n:]
			a.size += n
			if a.have < messageHeader {
				break
			}
			a.left = binary.BigEndian.Uint32(a.head[1:])
			w.makeRoom(a)
		}
		n := min(uint64(a.left), uint64(len(p)))
		a.left, p = a.left-uint32(n), p[n:]
		a.size += int(n)
		if a.left == 0 {
			a.over()
			a.count = min(len(p), 1) // the next one may have begun in the same frame
		}
	}
	if a.count > crumbs+a.size/crumb || w.rules.Unread > 0 && s.frames > w.rules.Unread {
		w.hungUp = true
	}
}

func (w *watched) broken(err error) {
	if w.rules.Broken != nil {
		w.rules.Broken(err)
	}
}

// makeRoom takes a place for a message of which the length is known, if it is a large one.
func (w *watched) makeRoom(a *arrival) {
	if w.rules.Large == nil || uint64(a.left) <= uint64(w.rules.Above) {
		return
	}
	// Who gives way may be another connection, whose mu another goroutine holds: nothing but its socket is touched.
	leave, ok := w.rules.Large.Enter(w.rules.Whose, func() {
		w.broken(errHungUp)
		_ = w.Conn.Close()
	})
	if !ok {
		w.hungUp = true
		return
	}
	a.leave = leave
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
		left := w.rules.Patience - now.Sub(s.began)
		if left <= 0 {
			w.hungUp = true
			w.broken(errLate)
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
