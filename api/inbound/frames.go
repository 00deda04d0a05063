package inbound

import "encoding/binary"

// What is looked at of HTTP/2, RFC 9113: frames (section 4.1), their types and flags (section 6).
const (
	frameHeader = 9
	typeData    = 0
	typeHeaders = 1
	typeReset   = 3
	typeWindow  = 8
	flagEnd     = 0x1
	flagPadded  = 0x8
)

// frame is the head of a frame.
type frame struct {
	length int
	kind   byte
	flags  byte
	stream uint32
}

// ends reports whether its sender says no more on the stream.
func (f frame) ends() bool {
	return f.kind == typeReset || f.flags&flagEnd != 0 && (f.kind == typeData || f.kind == typeHeaders)
}

// frames reads one direction of a connection as it passes by, in pieces of any size. It checks nothing: that is the business
// of whoever is spoken to.
type frames struct {
	// skip is what is left of a preface, or of a frame's padding and of a payload that is of no interest, in bytes.
	skip int
	head [frameHeader]byte
	have int // of head
	now  frame
	// left is what is left of the payload of now, padding excluded; unpadded: the length of the padding is still to come.
	left     int
	unpadded bool
	inside   bool
}

// see takes the next piece. begin is told of each frame, data of the content of DATA frames and of WINDOW_UPDATE frames, end of a
// frame's end.
func (r *frames) see(p []byte, begin func(frame), data func(f frame, p []byte), end func(frame)) {
	for len(p) > 0 || r.inside && r.left == 0 && r.skip == 0 && !r.unpadded {
		switch {
		case !r.inside && r.skip > 0: // the preface
			n := min(r.skip, len(p))
			r.skip, p = r.skip-n, p[n:]
		case !r.inside:
			n := copy(r.head[r.have:], p)
			r.have, p = r.have+n, p[n:]
			if r.have == frameHeader {
				r.enter()
				begin(r.now)
			}
		case r.unpadded:
			r.skip = min(int(p[0]), r.left-1)
			r.left -= 1 + r.skip
			r.unpadded, p = false, p[1:]
		case r.left > 0:
			n := min(r.left, len(p))
			data(r.now, p[:n])
			r.left, p = r.left-n, p[n:]
		case r.skip > 0:
			n := min(r.skip, len(p))
			r.skip, p = r.skip-n, p[n:]
		default:
			r.inside, r.have = false, 0
			end(r.now)
		}
	}
}

// enter begins the frame whose head has come.
func (r *frames) enter() {
	r.now = frame{
		length: int(r.head[0])<<16 | int(r.head[1])<<8 | int(r.head[2]), kind: r.head[3], flags: r.head[4],
		stream: binary.BigEndian.Uint32(r.head[5:]) &^ (1 << 31),
	}
	r.inside, r.left, r.skip, r.unpadded = true, 0, r.now.length, false
	if r.now.kind == typeData || r.now.kind == typeWindow {
		r.left, r.skip = r.now.length, 0
		r.unpadded = r.now.kind == typeData && r.now.flags&flagPadded != 0 && r.now.length > 0
	}
}
