package mesh

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Reading is what one Envoy says of itself: its certificate from /certs, the rest from its statistics.
type Reading struct {
	Identity string
	// Serial is lower-case hex.
	Serial   string
	From, To time.Time
	// Contexts counts how often SDS replaced the TLS context (ssl_context_update_by_sds), the first time included.
	Contexts int64
	// Updates are the secrets that this Envoy took, Rejected those that it did not.
	Updates, Rejected int64
	// Handshakes that succeeded, and HandshakeFaults: those that failed for a certificate.
	Handshakes, HandshakeFaults int64
	// OK and Failed are the requests that this proxy answered.
	OK, Failed int64
}

// Left is how much of the certificate's life is left; never negative.
func (r Reading) Left(now time.Time) time.Duration { return max(0, r.To.Sub(now)) }

// certificates is Envoy's answer at /certs, as far as it is read here.
type certificates struct {
	Certificates []struct {
		CertChain []struct {
			SerialNumber    string `json:"serial_number"`
			SubjectAltNames []struct {
				URI string `json:"uri"`
			} `json:"subject_alt_names"`
			ValidFrom      time.Time `json:"valid_from"`
			ExpirationTime time.Time `json:"expiration_time"`
		} `json:"cert_chain"`
	} `json:"certificates"`
}

// readCertificate finds the certificate for the identity, the one that lives longest where an old one still drains.
func (r *Reading) readCertificate(answer []byte, identity string) error {
	var certs certificates
	if err := json.Unmarshal(answer, &certs); err != nil {
		return fmt.Errorf("/certs: %w", err)
	}
	found := false
	for _, context := range certs.Certificates {
		for _, c := range context.CertChain {
			if len(c.SubjectAltNames) != 1 || c.SubjectAltNames[0].URI != identity || !c.ExpirationTime.After(r.To) {
				continue
			}
			r.Identity, r.Serial, r.From, r.To = identity, c.SerialNumber, c.ValidFrom, c.ExpirationTime
			found = true
		}
	}
	if !found {
		return fmt.Errorf("/certs shows no certificate for %s yet", identity)
	}
	return nil
}

// Stats are Envoy's counters and gauges by name.
type Stats map[string]int64

// Sum adds what stands under every name that begins and ends so.
func (s Stats) Sum(prefix, suffix string) int64 {
	var n int64
	for name, value := range s {
		if strings.HasPrefix(name, prefix) && strings.HasSuffix(name, suffix) {
			n += value
		}
	}
	return n
}

// parseStats reads Envoy's /stats?format=json, of which histograms and texts are left out.
func parseStats(answer []byte) (Stats, error) {
	var list struct {
		Stats []struct {
			Name  string          `json:"name"`
			Value json.RawMessage `json:"value"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(answer, &list); err != nil {
		return nil, fmt.Errorf("/stats: %w", err)
	}
	s := make(Stats, len(list.Stats))
	for _, e := range list.Stats {
		if n, err := strconv.ParseInt(string(e.Value), 10, 64); err == nil {
			s[e.Name] = n
		}
	}
	return s, nil
}

// readStats takes what a Reading shows. tls is the prefix of the side that speaks mTLS ("listener." or "cluster."),
// http that of the requests which this proxy answers.
func (r *Reading) readStats(s Stats, tls, http string) {
	r.Contexts = s.Sum(tls, ".ssl_context_update_by_sds")
	r.Handshakes = s.Sum(tls, ".ssl.handshake")
	for _, fault := range []string{"error", "san", "no_cert", "cert_hash"} {
		r.HandshakeFaults += s.Sum(tls, ".ssl.fail_verify_"+fault)
	}
	r.HandshakeFaults += s.Sum(tls, ".ssl.connection_error")
	r.OK = s[http+"downstream_rq_2xx"]
	r.Failed = s[http+"downstream_rq_4xx"] + s[http+"downstream_rq_5xx"]
	r.Updates = s.Sum("sds.", ".update_success")
	r.Rejected = s.Sum("sds.", ".update_rejected")
}
