package sds

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// codec is grpc's for protocol buffers, with buffers of the size that is needed. The usual ones are of a few sizes, so that an
// answer of 40 KiB that its peer does not read would hold a MiB.
type codec struct{}

var _ encoding.CodecV2 = codec{}

// Marshal encodes a message.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("%T is no protocol buffer", v)
	}
	size := proto.Size(m)
	if mem.IsBelowBufferPoolingThreshold(size) || size > maxPooled {
		data, err := proto.Marshal(m)
		return mem.BufferSlice{mem.SliceBuffer(data)}, err
	}
	buffer := buffers.Get(size)
	data, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend((*buffer)[:0], m)
	if err != nil {
		buffers.Put(buffer)
		return nil, err
	}
	*buffer = data
	return mem.BufferSlice{mem.NewBuffer(buffer, buffers)}, nil
}

// buffers are used again, or a push to a thousand proxies would leave as many to be collected. None is twice as large as what is
// in it.
var buffers = mem.NewTieredBufferPool(2<<10, 3<<10, 4<<10, 6<<10, 8<<10, 12<<10, 16<<10, 24<<10, maxPooled)

const maxPooled = 32 << 10

// Unmarshal decodes a message.
func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is no protocol buffer", v)
	}
	if len(data) == 1 {
		return proto.Unmarshal(data[0].ReadOnlyData(), m)
	}
	return proto.Unmarshal(data.Materialize(), m)
}

// Name is what stands in the content type of calls.
func (codec) Name() string { return "proto" }
