package inbound

import (
	"bytes"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

const (
	patience   = 10 * time.Second
	mostUnread = 200
)

// client is the other end of a connection that is watched, and reads and writes nothing by itself.
type client struct {
	t *testing.T
	*http2.Framer
	server *http2.Framer // what the server writes
	gone   atomic.Bool   // the server's reading ended
}

// withClient runs a test in a bubble, whose server reads whatever comes.
func withClient(t *testing.T, test func(c *client)) {
	t.Helper()
	withRules(t, func() Rules { return Rules{Patience: patience, Unread: mostUnread} }, test)
}

func withRules(t *testing.T, rules func() Rules, test func(c *client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		w := Watch(far, rules())
		c := &client{t: t, Framer: http2.NewFramer(near, nil), server: http2.NewFramer(w, nil)}
		go func() { _, _ = io.Copy(io.Discard, near) }()
		go func() {
			_, _ = io.Copy(io.Discard, struct{ io.Reader }{w})
			c.gone.Store(true)
		}()
		if _, err := io.WriteString(near, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		c.must(c.WriteSettings())
		test(c)
		_, _ = w.Close(), near.Close()
	})
}

func (c *client) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// call opens a stream.
func (c *client) call(stream uint32) {
	c.t.Helper()
	c.must(c.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte{0x80}, EndHeaders: true}))
}

// stands reports whether the connection is still open after d.
func (c *client) stands(d time.Duration) bool {
	time.Sleep(d)
	synctest.Wait()
	return !c.gone.Load()
}

// message is one of n bytes, none of them content.
func message(n int) []byte { return append([]byte{0, 0, 0, byte(n >> 8), byte(n)}, make([]byte, n)...) }

// A call is open until its end is written, and not only until the client has said its last.
func TestCallsAreCounted(t *testing.T) {
	var open, wrote atomic.Int64
	var told atomic.Pointer[error]
	rules := func() Rules {
		return Rules{
			Patience: patience, Opened: func() bool { return open.Add(1) <= 3 }, Ended: func(n int) { open.Add(int64(-n)) },
			Wrote: func(n int) { wrote.Add(int64(n)) }, Broken: func(err error) { told.Store(&err) },
		}
	}
	withRules(t, rules, func(c *client) {
		is := func(what string, want int64) {
			t.Helper()
			synctest.Wait()
			if n := open.Load(); n != want {
				t.Errorf("%s: %d calls are open, want %d", what, n, want)
			}
		}
		c.call(1)
		c.must(c.WriteData(1, true, message(0)))
		c.call(3)
		is("one has said its last", 2)
		c.must(c.server.WriteData(1, false, message(5)))
		is("an answer", 2)
		c.must(c.server.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x80}, EndHeaders: true, EndStream: true}))
		is("its end", 1)
		c.must(c.WriteRSTStream(3, http2.ErrCodeCancel))
		is("the client gives one up", 0)
		c.call(5)
		c.must(c.server.WriteRSTStream(5, http2.ErrCodeCancel))
		is("the server gives one up", 0)
		if n := wrote.Load(); n != 10 {
			t.Errorf("%d bytes of content are written, want 10", n)
		}
		for i := range uint32(4) {
			c.call(7 + 2*i)
		}
		if c.stands(0) || told.Load() == nil {
			t.Error("the connection stays open, or nobody is told")
		}
	})
	if n := open.Load(); n != 0 {
		t.Errorf("%d calls are open of a connection that is closed", n)
	}
}

// late has its bytes only when the connection has been closed.
type late struct {
	net.Conn
	bytes  []byte
	closed func()
}

func (c *late) Read(p []byte) (int, error) { c.closed(); return copy(p, c.bytes), nil }
func (c *late) Close() error               { return nil }

// What was on its way when the connection was closed counts for nobody: nobody would take it off.
func TestWhatComesAfterTheEnd(t *testing.T) {
	var said bytes.Buffer
	said.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&said, nil)
	if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x80}, EndHeaders: true}); err != nil {
		t.Fatal(err)
	}
	if err := fr.WriteData(1, false, message(101)[:50]); err != nil {
		t.Fatal(err)
	}
	room, open := NewRoom(1, time.Minute), 0
	c := &late{bytes: said.Bytes()}
	w := Watch(c, Rules{Patience: patience, Large: room, Above: 100, Whose: "pod",
		Opened: func() bool { open++; return true }, Ended: func(n int) { open -= n }})
	c.closed = func() { _ = w.Close() }
	if _, err := w.Read(make([]byte, 1<<10)); err == nil || open != 0 || len(room.guests) != 0 {
		t.Errorf("%v; %d calls are open, %d large messages have a place", err, open, len(room.guests))
	}
}

// Large messages need a place until they are whole, or given up.
func TestLargeMessagesNeedRoom(t *testing.T) {
	var room *Room
	rules := func() Rules {
		room = NewRoom(1, time.Minute)
		return Rules{Patience: patience, Large: room, Above: 100, Whose: "pod"}
	}
	taken := func() int {
		synctest.Wait()
		room.mu.Lock()
		defer room.mu.Unlock()
		return len(room.guests)
	}
	large := message(101)
	for what, end := range map[string]func(c *client){
		"whole":               func(c *client) { c.must(c.WriteData(1, false, large[50:])) },
		"the client gives up": func(c *client) { c.must(c.WriteRSTStream(1, http2.ErrCodeCancel)) },
		"the server gives up": func(c *client) { c.must(c.server.WriteRSTStream(1, http2.ErrCodeCancel)) },
		"late":                func(c *client) { c.stands(patience + time.Second) },
	} {
		withRules(t, rules, func(c *client) {
			c.call(1)
			c.must(c.WriteData(1, false, message(100)))
			if n := taken(); n != 0 {
				t.Errorf("%s: a small message has a place", what)
			}
			c.must(c.WriteData(1, false, large[:50]))
			if n := taken(); n != 1 {
				t.Errorf("%s: the message has no place", what)
			}
			if _, ok := room.Enter("another pod", func() {}); ok {
				t.Errorf("%s: there is place for two", what)
			}
			if end(c); what == "late" {
				return // whoever reads closes the connection, and with that the place is free
			}
			if n := taken(); n != 0 {
				t.Errorf("%s: its place stays taken", what)
			}
		})
	}
}

func TestMessagesThatDoNotEnd(t *testing.T) {
	for what, pieces := range map[string][][]byte{
		"the first one":             {message(100)[:50]},
		"a later one":               {message(10), message(0), message(100)[:50]},
		"begun in the same frame":   {append(message(10), message(100)[:50]...)},
		"not even its length":       {message(10), message(100)[:3]},
		"its length alone":          {message(100)[:5]},
		"the last byte is missing":  {message(3000)[:1000], message(3000)[1000:3004]},
		"after others on a stream":  {message(3000)[:1000], message(3000)[1000:], message(7)[:6]},
		"in a piece now and then":   {message(100)[:50], {1}, {1}},
		"a message without content": {message(0), message(0)[:4]},
	} {
		t.Run(what, func(t *testing.T) {
			withClient(t, func(c *client) {
				c.call(1)
				for _, p := range pieces {
					c.must(c.WriteDataPadded(1, false, p, make([]byte, 7)))
				}
				if !c.stands(patience - time.Second) {
					t.Fatal("it is not given its time")
				}
				if c.stands(2 * time.Second) {
					t.Error("the connection stays open")
				}
			})
		})
	}
}

// Whoever sends whole messages may rest between them for as long as he likes, and may give a call up halfway; the server
// may, too.
func TestConnectionsThatStay(t *testing.T) {
	for what, say := range map[string]func(c *client){
		"no message":   func(*client) {},
		"whole ones":   func(c *client) { c.must(c.WriteData(1, false, slices.Concat(message(10), message(0), message(3000)))) },
		"not a stream": func(c *client) { c.must(c.WriteData(3, false, message(9)[:8])) },
		"an empty part": func(c *client) {
			c.must(c.WriteData(1, false, nil))
			c.must(c.WriteDataPadded(1, false, nil, make([]byte, 3)))
		},
		"in time": func(c *client) {
			c.must(c.WriteData(1, false, message(9)[:8]))
			time.Sleep(patience - time.Second)
			c.must(c.WriteData(1, false, append(message(9)[8:], message(9)[:8]...)))
			time.Sleep(patience - time.Second)
			c.must(c.WriteData(1, false, message(9)[8:]))
		},
		"reset": func(c *client) {
			c.must(c.WriteData(1, false, message(9)[:8]))
			c.must(c.WriteRSTStream(1, http2.ErrCodeCancel))
		},
		"ended": func(c *client) { c.must(c.WriteData(1, true, message(9)[:8])) },
		"reset by the server": func(c *client) {
			c.must(c.WriteData(1, false, message(9)[:8]))
			c.must(c.server.WriteRSTStream(1, http2.ErrCodeNo))
		},
		"ended by the server": func(c *client) {
			c.must(c.WriteData(1, false, message(9)[:8]))
			c.must(c.server.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x80}, EndHeaders: true, EndStream: true}))
		},
	} {
		t.Run(what, func(t *testing.T) {
			withClient(t, func(c *client) {
				c.call(1)
				say(c)
				if !c.stands(time.Hour) {
					t.Error("the connection was closed")
				}
			})
		})
	}
}

func TestMessagesInCrumbs(t *testing.T) {
	send := func(c *client, size, piece int) {
		c.call(1)
		for m := range slices.Chunk(message(size), piece) {
			if c.gone.Load() || c.WriteData(1, false, m) != nil {
				return
			}
		}
	}
	withClient(t, func(c *client) {
		send(c, 1000, 1)
		if c.stands(0) {
			t.Error("a message in single bytes is taken")
		}
	})
	for _, piece := range []int{600, 1000, 16 << 10} {
		withClient(t, func(c *client) {
			send(c, 60_000, piece)
			if !c.stands(0) {
				t.Errorf("a message in pieces of %d bytes is not taken", piece)
			}
		})
	}
}

// Whole messages that the server does not read are counted, until it widens the window for what it has read.
func TestUnreadMessages(t *testing.T) {
	say := func(c *client, n, size, padding int) { // until it is hung up on
		for range n {
			if padding > 0 {
				_ = c.WriteDataPadded(1, false, message(size-messageHeader), make([]byte, padding))
			} else {
				_ = c.WriteData(1, false, message(size-messageHeader))
			}
		}
	}
	widen := func(c *client, n int) { _ = c.server.WriteWindowUpdate(1, uint32(n)) }
	for what, c := range map[string]struct {
		do     func(c *client)
		stands bool
	}{
		"as many as may be": {func(c *client) { say(c, mostUnread, 5, 0) }, true},
		"one more":          {func(c *client) { say(c, mostUnread+1, 5, 0) }, false},
		"of other streams":  {func(c *client) { c.call(3); say(c, mostUnread, 5, 0); c.must(c.WriteData(3, false, message(0))) }, true},
		"without any content": {func(c *client) {
			for range mostUnread {
				c.must(c.WriteData(1, false, nil))
			}
		}, true},
		"without an end": {func(c *client) {
			for range 100 {
				say(c, 160, 100, 0)
				widen(c, 16_000)
			}
		}, true},
		"unread for long": {func(c *client) { say(c, 120, 100, 0); c.stands(time.Hour); say(c, 120, 100, 0) }, false},
		"the other stream's word": {func(c *client) {
			c.call(3)
			say(c, 160, 100, 0)
			c.must(c.server.WriteWindowUpdate(3, 16_000))
			say(c, 160, 100, 0)
		}, false},
		"the connection's word": {func(c *client) {
			say(c, 160, 100, 0)
			c.must(c.server.WriteWindowUpdate(0, 16_000))
			say(c, 160, 100, 0)
		}, false},
		// Servers give padding back at once, read or not.
		"padding that came back": {func(c *client) {
			for range 8 {
				say(c, 40, 50, 200)
				widen(c, 40*201)
			}
		}, false},
		"padding, and all of it read": {func(c *client) {
			for range 40 {
				say(c, 64, 99, 156)
				widen(c, 64*(99+157))
			}
		}, true},
		"few that are large first": {func(c *client) {
			c.must(c.WriteData(1, false, message(16_000)))
			say(c, 190, 5, 0)
			widen(c, 16_005)
			say(c, 20, 5, 0)
		}, false},
	} {
		t.Run(what, func(t *testing.T) {
			withClient(t, func(cl *client) {
				cl.call(1)
				c.do(cl)
				if cl.stands(0) != c.stands {
					t.Errorf("the connection is open: %v, want %v", !c.stands, c.stands)
				}
			})
		})
	}
}

// A frame counts once, in however many pieces it is read.
func TestPiecesOfAFrame(t *testing.T) {
	var u unread
	for range 2 {
		u.frame(300)
		for range 300 {
			u.content(1)
		}
	}
	if u.frames != 2 || u.came != 600 {
		t.Errorf("%d frames with %d bytes", u.frames, u.came)
	}
}

func TestStreamsOfAConnectionAreBounded(t *testing.T) {
	withClient(t, func(c *client) {
		for i := range uint32(maxStreams) {
			c.call(1 + 2*i)
		}
		if !c.stands(0) {
			t.Fatal("too few are taken")
		}
		c.call(1 + 2*maxStreams)
		if c.stands(0) {
			t.Error("one more is taken")
		}
	})
}

// However the bytes come, the same is seen.
func FuzzFrames(f *testing.F) {
	var b bytes.Buffer
	frames := http2.NewFramer(&b, nil)
	for _, err := range []error{
		frames.WriteSettings(), frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x80}, EndHeaders: true}),
		frames.WriteDataPadded(1, false, message(10), make([]byte, 7)), frames.WriteData(1, true, nil),
	} {
		if err != nil {
			f.Fatal(err)
		}
	}
	f.Add(slices.Concat([]byte(http2.ClientPreface), b.Bytes()), 3)
	f.Add(slices.Concat([]byte(http2.ClientPreface), []byte{0, 0, 1, typeData, flagPadded, 0, 0, 0, 1, 200}), 1)
	f.Fuzz(func(t *testing.T, p []byte, size int) {
		see := func(size int) (seen []byte, begun, ended []frame) {
			r := &streamed{}
			for piece := range slices.Chunk(p, max(1, size)) {
				r.see(piece)
			}
			return r.data, r.begun, r.ended
		}
		data, begun, ended := see(len(p))
		other, begun2, ended2 := see(size)
		if !bytes.Equal(data, other) || !slices.Equal(begun, begun2) || !slices.Equal(ended, ended2) {
			t.Errorf("in pieces of %d: %x, %v, %v, and in one: %x, %v, %v", size, other, begun2, ended2, data, begun, ended)
		}
		w := Watch(nowhere{r: bytes.NewReader(p)}, Rules{Patience: patience})
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{w})
		_ = w.Close()
	})
}

// streamed is what frames tells of.
type streamed struct {
	frames
	started      bool
	data         []byte
	begun, ended []frame
}

func (s *streamed) see(p []byte) {
	if !s.started {
		s.skip, s.started = preface, true
	}
	s.frames.see(p, func(f frame) { s.begun = append(s.begun, f) },
		func(_ frame, p []byte) { s.data = append(s.data, p...) }, func(f frame) { s.ended = append(s.ended, f) })
}

// nowhere is a connection to read from alone.
type nowhere struct {
	net.Conn
	r io.Reader
}

func (n nowhere) Read(p []byte) (int, error) { return n.r.Read(p) }
func (nowhere) Close() error                 { return nil }
