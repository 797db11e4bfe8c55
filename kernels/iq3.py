"""IQ3_XXS and IQ3_S: four values at a time are a point of a lattice, with signs and a scale.

Super-blocks of 256 values, 64 points, whose coordinates have eight levels; a set bit of signs is a minus.

IQ3_XXS, 256 points: value = d * (scale + 1/2) / 2 * point[j], with coordinates of 4, 12, ... 52 and 62 and a
scale of 4 bits. Block of 98 bytes (ggml-common.h, block_iq3_xxs): d as binary16; 64 bytes that number points;
eight uint32, one for each 32 values: seven bits of signs for each two points and a scale above them. The
eighth sign is the one that makes the number of minuses even.

IQ3_S, 512 points: value = d * (2 * scale + 1) * point[j], with coordinates of 1, 3, ... 15 and a scale of 4
bits. Block of 110 bytes (block_iq3_s): d; 64 bytes with the lower eight bits of the points' numbers; eight
bytes with the ninth of eight points each, the first lowest; 32 bytes of signs; four bytes with two scales,
each for 32 values, the first in the lower half.

Two points become a word of eight nibbles, a nibble the number of a level with the sign above it, and a loop
takes those apart in SIMD: twice the speed of looking up eight floats.
"""

import numpy as np
from numba import njit

from edgemerge.kernels.scalars import half_to_float, read_word

# iq3xxs_grid and iq3s_grid: the points, a digit for the number of each coordinate's level.
DIGITS_XXS = (
    "000020004000110031007100020022001300240037005700101030100110211012105210031023101410451007100020"
    "202040201120022022201320332073201520752057201030703001302130523007303140734044407540374057401050"
    "705023502550536046600170417061703470167010013001010121011201320103012301430174010501001120111111"
    "021122111021302101212121122103212721003120310231133164316631104150410541025142516451175150612271"
    "047100022002110231020202220262021302240210123012501201122112121203123612761207120022202211227122"
    "022222227322042255221032013241320732473253423542305272521452475210723072617254721003010321031203"
    "320305035603270300132013021313134413641310233023012352232523272311333333034374432743005360532253"
    "555341636363366333730673400471045304730435047504471402247324042406246624703454344044154446445254"
    "345407545074017421740374210514050705001560156215551541252325272520353535014532457245274520551355"
    "056542752475420644066406460612161616712646260336633644465056255633663076127630075007700701072307"
    "2507621704172127542725270037513733370637124714470057205742570367"
)
DIGITS_S = (
    "000010002000500070000100110021004100610002001200520033000400240054007400150035000600260017004700"
    "770000101010201040100110111051100210321072101310531044101610561027100020102050207020012031206120"
    "122052200320432024205420742015203520072037203030113051300230223013303330633044300530253076301730"
    "573000403140714012404240234004403440154007402050405002502250625033501450545074506650375060601160"
    "316013602560176000702070407002702270627033700570457000011001200140010101110131015101710102012201"
    "130143016301450165011601270100111011301160110111411112110311331114110511251107116711002121215121"
    "712102214221232104213421552106212721103140317031013131311231723103314331143126310731304150412141"
    "414113413341244164410541454110510151315112510351235115510261426172614461646110713071017121711271"
    "537114712671077100021002300250027002010221024102610212023202720203022302140234025402050225027602"
    "070237025702001220120112311271122212521213124312241215121022402270221222322203227322142235227522"
    "172247220032203250321132223242321332333224320532663210427042024232422342534214422742574240521152"
    "225273520452355207520062206270621262556216625072117262720372347205722003110331035103710322031303"
    "330353032403440374031503360317031013301350134113121332130413061327136713002321230223232343230523"
    "103301334133123332337233033314333433743355333733304311436143224313432543064346431053015321535253"
    "235344536553375361631463107330730273227353730004400421040204420472042304140405040704201470141114"
    "311422140314531434141514551410243024012451241224332404247524262407244034113431340234223413345334"
    "004420444244734404441744505470541254265431644364066401745174037434741574200501054105220504054405"
    "740525056605470510153015501521151215231527150025112532250325632535252035703501357235443515355635"
    "373510454045024523456445215562551555355524652075407522751106310651061306330606060016021672164616"
    "212643262426552626260726003641361236043652463446264600563056435606565066046611763176000740077007"
    "020722076307040745072607201711174217341754171027402701276127122703271527203723375337353710475047"
    "31470247054722572457206713670077"
)


def _unpack(digits):
    return (np.frombuffer(digits.encode(), np.uint8) - ord("0")).reshape(-1, 4)


def _words(numbers):
    # Eight nibbles to the word, the first lowest
    shifts = 4 * np.arange(numbers.shape[-1], dtype=np.uint32)
    return (numbers.astype(np.uint32) << shifts).sum(-1, dtype=np.uint32)


POINTS_XXS = _words(_unpack(DIGITS_XXS))
POINTS_S = _words(_unpack(DIGITS_S))
# The signs of a byte, a set bit for a minus, where the words have room; of seven the eighth makes them even.
SIGNS = _words(np.array([[s >> j & 1 for j in range(8)] for s in range(256)])) << np.uint32(3)
EVEN_SIGNS = SIGNS[[s | (s.bit_count() & 1) << 7 for s in range(128)]]  # ksigns_iq2xs


@njit(cache=True, nogil=True, error_model="numpy")
def _value_xxs(nibble):
    number = np.int32(nibble & 7)
    level = np.int32(8 * number + 4 + (number + 1 >> 3 << 1))  # the last is not 60 but 62
    return np.float32(np.int32(-level if nibble & 8 else level))


@njit(cache=True, nogil=True, error_model="numpy")
def _value_s(nibble):
    level = np.int32(2 * (nibble & 7) + 1)
    return np.float32(np.int32(-level if nibble & 8 else level))


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_xxs(w0, w1, w2, w3, step, y):
    # Four words -> 32 values. Sixteen lanes a turn, as LLVM vectorises no loop of eight.
    for k in range(16):
        shift = np.uint32(4 * (k & 7))
        second = (k & 8) != 0
        y[k] = step * _value_xxs(np.int32((w1 if second else w0) >> shift))
        y[16 + k] = step * _value_xxs(np.int32((w3 if second else w2) >> shift))


@njit(cache=True, nogil=True, error_model="numpy")
def _spread_s(w0, w1, w2, w3, step, y):
    for k in range(16):
        shift = np.uint32(4 * (k & 7))
        second = (k & 8) != 0
        y[k] = step * _value_s(np.int32((w1 if second else w0) >> shift))
        y[16 + k] = step * _value_s(np.int32((w3 if second else w2) >> shift))


@njit(cache=True, nogil=True, error_model="numpy")
def _pair_xxs(points, signs):
    pair = POINTS_XXS[points[0]] | POINTS_XXS[points[1]] << np.uint32(16)
    return np.uint32(pair | EVEN_SIGNS[signs & np.uint32(127)])


@njit(cache=True, nogil=True, error_model="numpy")
def decode_iq3_xxs(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_iq3_xxs).

    Parameters
    ----------
    raw_u8 : (n_blocks * 98,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 98):
        block = raw_u8[98 * i : 98 * i + 98]
        d = half_to_float(block[0], block[1])
        for j in range(8):
            points = block[2 + 8 * j : 10 + 8 * j]
            signs = read_word(block, np.uint64(66 + 4 * j))
            step = np.float32(d * np.float32(np.float32(np.int32(signs >> 28)) + np.float32(0.5)))
            step = np.float32(step * np.float32(0.5))
            w0 = _pair_xxs(points[:2], signs)
            w1 = _pair_xxs(points[2:4], signs >> np.uint32(7))
            w2 = _pair_xxs(points[4:6], signs >> np.uint32(14))
            w3 = _pair_xxs(points[6:], signs >> np.uint32(21))
            first = 256 * i + 32 * j
            _spread_xxs(w0, w1, w2, w3, step, out_f32[first : first + 32])


@njit(cache=True, nogil=True, error_model="numpy")
def _pair_s(lower, ninths, signs):
    first = POINTS_S[np.uint32(lower[0] | ninths << np.uint32(8) & 0x100)]
    second = POINTS_S[np.uint32(lower[1] | ninths << np.uint32(7) & 0x100)]
    return np.uint32(first | second << np.uint32(16) | SIGNS[signs])


@njit(cache=True, nogil=True, error_model="numpy")
def decode_iq3_s(raw_u8, out_f32):
    """Write the values of whole blocks (dequantize_row_iq3_s).

    Parameters
    ----------
    raw_u8 : (n_blocks * 110,) uint8
        blocks, laid out as the head of this file says
    out_f32 : (n_blocks * 256,) float32
        written
    """
    for i in range(raw_u8.size // 110):
        block = raw_u8[110 * i : 110 * i + 110]
        d = half_to_float(block[0], block[1])
        for j in range(8):
            lower = block[2 + 8 * j : 10 + 8 * j]
            ninths = np.uint32(block[66 + j])
            signs = block[74 + 4 * j : 78 + 4 * j]
            scale = np.int32(block[106 + (j >> 1)]) >> np.int32(4 * (j & 1)) & 15
            step = np.float32(d * np.float32(np.int32(2 * scale + 1)))
            w0 = _pair_s(lower[:2], ninths, signs[0])
            w1 = _pair_s(lower[2:4], ninths >> np.uint32(2), signs[1])
            w2 = _pair_s(lower[4:6], ninths >> np.uint32(4), signs[2])
            w3 = _pair_s(lower[6:], ninths >> np.uint32(6), signs[3])
            first = 256 * i + 32 * j
            _spread_s(w0, w1, w2, w3, step, out_f32[first : first + 32])
