package kubernetes

// plainReader reads JSON as API servers write it in tokens: without white space, its names known, its texts without escapes,
// its numbers whole. That takes a tenth of what the library takes, which would else be a fifth of an attestation.
//
// Whatever else it meets, it gives up on, and the library reads all of it again and decides. So it can only read what
// the library reads too, and reads it as the library does; a fuzz target holds it to that.
type plainReader struct {
	in   string
	at   int
	fail bool
}

func plainClaims(payload []byte) (c claims, ok bool) {
	r := plainReader{in: string(payload)}
	r.object(func(name string) (bit uint) {
		switch name {
		case "iss":
			c.Issuer = r.text()
			return 1 << 0
		case "sub":
			c.Subject = r.text()
			return 1 << 1
		case "aud":
			c.Audience = r.texts()
			return 1 << 2
		case "exp":
			c.Expiry = r.number()
			return 1 << 3
		case "nbf":
			c.Not = r.number()
			return 1 << 4
		case "iat":
			c.Issued = r.number()
			return 1 << 5
		case "jti":
			c.ID = r.text()
			return 1 << 6
		case "kubernetes.io":
			r.kubernetes(&c)
			return 1 << 7
		}
		return 0
	})
	return c, r.ended()
}

func (r *plainReader) kubernetes(c *claims) {
	k := &c.Kubernetes
	r.object(func(name string) (bit uint) {
		switch name {
		case "namespace":
			k.Namespace = r.text()
			return 1 << 0
		case "serviceaccount":
			k.ServiceAccount = r.reference()
			return 1 << 1
		case "pod":
			k.Pod = r.reference()
			return 1 << 2
		case "node":
			k.Node = r.reference()
			return 1 << 3
		case "warnafter":
			r.number() // when the API server starts to warn of use; it is no limit
			return 1 << 4
		}
		return 0
	})
}

func (r *plainReader) reference() (ref reference) {
	r.object(func(name string) (bit uint) {
		switch name {
		case "name":
			ref.Name = r.text()
			return 1 << 0
		case "uid":
			ref.UID = r.text()
			return 1 << 1
		}
		return 0
	})
	return ref
}

func plainHeader(raw []byte) (h header, ok bool) {
	r := plainReader{in: string(raw)}
	r.object(func(name string) (bit uint) {
		switch name {
		case "alg":
			h.Alg = r.text()
			return 1 << 0
		case "kid":
			h.Kid = r.text()
			return 1 << 1
		case "typ":
			r.text()
			return 1 << 2
		}
		return 0
	})
	return h, r.ended()
}

// object reads an object. field reads the value of the name and returns a bit of its own for it: none is a name that is
// not known, and one that was there before is a name that is repeated.
func (r *plainReader) object(field func(name string) (bit uint)) {
	r.expect('{')
	var seen uint
	for !r.fail {
		name := r.text()
		r.expect(':')
		bit := field(name)
		if bit == 0 || seen&bit != 0 {
			r.fail = true
			return
		}
		seen |= bit
		if r.next() != ',' {
			r.expect('}')
			return
		}
		r.at++
	}
}

func (r *plainReader) texts() []string {
	if r.next() == '"' {
		return []string{r.text()}
	}
	var all []string
	r.expect('[')
	for !r.fail {
		all = append(all, r.text())
		if r.next() != ',' {
			r.expect(']')
			break
		}
		r.at++
	}
	return all
}

// text reads printable ASCII between quotes.
func (r *plainReader) text() string {
	r.expect('"')
	start := r.at
	for ; r.at < len(r.in); r.at++ {
		switch c := r.in[r.at]; {
		case c == '"':
			r.at++
			return r.in[start : r.at-1]
		case c < ' ' || c > '~' || c == '\\':
			r.fail = true
			return ""
		}
	}
	r.fail = true
	return ""
}

// number reads a whole number of seconds, of at most eleven digits: to the year 5138.
func (r *plainReader) number() seconds {
	start := r.at
	var n seconds
	for r.at < len(r.in) && r.in[r.at] >= '0' && r.in[r.at] <= '9' && r.at-start < 11 {
		n = n*10 + seconds(r.in[r.at]-'0')
		r.at++
	}
	if digits := r.at - start; digits == 0 || (digits > 1 && r.in[start] == '0') {
		r.fail = true
	}
	return n
}

func (r *plainReader) next() byte {
	if r.at < len(r.in) {
		return r.in[r.at]
	}
	return 0
}

func (r *plainReader) expect(c byte) {
	if r.next() != c {
		r.fail = true
		return
	}
	r.at++
}

// ended tells whether all was read, and understood.
func (r *plainReader) ended() bool { return !r.fail && r.at == len(r.in) }
