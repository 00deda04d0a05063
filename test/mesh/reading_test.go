package mesh

import (
	"testing"
	"time"
)

func TestReadCertificate(t *testing.T) {
	const answer = `{"certificates":[
	 {"ca_cert":[{"serial_number":"01","subject_alt_names":[{"uri":"spiffe://td"}]}],
	  "cert_chain":[{"path":"<inline>","serial_number":"aa","subject_alt_names":[{"uri":"spiffe://td/a"}],"valid_from":"2026-11-21T10:00:00Z","expiration_time":"2026-11-21T10:00:30Z"},
	                {"serial_number":"ff","subject_alt_names":[{"uri":"spiffe://td"}],"expiration_time":"2026-11-24T10:00:00Z"}]},
	 {"cert_chain":[{"serial_number":"bb","subject_alt_names":[{"uri":"spiffe://td/a"}],"valid_from":"2026-11-21T10:00:15Z","expiration_time":"2026-11-21T10:00:45Z"}]},
	 {"cert_chain":[{"serial_number":"cc","subject_alt_names":[{"uri":"spiffe://td/b"}],"expiration_time":"2026-11-21T11:00:00Z"}]}]}`
	var r Reading
	if err := r.readCertificate([]byte(answer), "spiffe://td/a"); err != nil {
		t.Fatal(err)
	}
	if r.Serial != "bb" || r.Identity != "spiffe://td/a" {
		t.Errorf("got serial %s of %s, want bb: the one that lives longest", r.Serial, r.Identity)
	}
	now := time.Date(2026, 11, 21, 10, 0, 40, 0, time.UTC)
	if got := r.Left(now); got != 5*time.Second {
		t.Errorf("left %s, want 5s", got)
	}
	if got := r.Left(now.Add(time.Hour)); got != 0 {
		t.Errorf("left an hour later %s, want 0", got)
	}
	for _, bad := range []string{`{"certificates":[]}`, `[`, ``} {
		var r Reading
		if err := r.readCertificate([]byte(bad), "spiffe://td/a"); err == nil {
			t.Errorf("%q: no error, and serial %q", bad, r.Serial)
		}
	}
}

func TestReadStats(t *testing.T) {
	s, err := parseStats([]byte(`{"stats":[
	 {"name":"listener.mtls.server_ssl_socket_factory.ssl_context_update_by_sds","value":5},
	 {"name":"listener.mtls.ssl.handshake","value":100},
	 {"name":"listener.mtls.ssl.fail_verify_san","value":2},
	 {"name":"listener.mtls.ssl.connection_error","value":3},
	 {"name":"cluster.service.ssl.handshake","value":7},
	 {"name":"http.requests.downstream_rq_2xx","value":90},
	 {"name":"http.requests.downstream_rq_4xx","value":1},
	 {"name":"http.requests.downstream_rq_5xx","value":4},
	 {"name":"http.admin.downstream_rq_2xx","value":900},
	 {"name":"sds.default.update_success","value":4},
	 {"name":"sds.ROOTCA.update_success","value":1},
	 {"name":"sds.default.update_rejected","value":1},
	 {"name":"cluster.service.version_text","value":"a text"},
	 {"histograms":{"supported_quantiles":[0]}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	var got Reading
	got.readStats(s, "listener.mtls.", "http.requests.")
	want := Reading{Contexts: 5, Updates: 5, Rejected: 1, Handshakes: 100, HandshakeFaults: 5, OK: 90, Failed: 5}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if _, err := parseStats([]byte(`no JSON`)); err == nil {
		t.Error("an answer that is no JSON: no error")
	}
}
